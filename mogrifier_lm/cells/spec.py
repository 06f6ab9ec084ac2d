"""What one recurrent layer is made of: names, shapes and initial values of its parameters.

One description serves the layers of the language model and `MogrifierLSTM`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mogrifier_lm.cells.cell import Cell
from mogrifier_lm.cells.lstm import LSTM
from mogrifier_lm.cells.mlstm import MLSTM
from mogrifier_lm.cells.rlstm import RLSTM
from mogrifier_lm.kernels.recurrence import Options, Round, Weights

CELLS: dict[str, Cell] = {"lstm": LSTM, "rlstm": RLSTM, "mlstm": MLSTM}


@contextmanager
def drawn_on_cpu(parameter: Tensor) -> Iterator[Tensor]:
    """Where to write initial values of `parameter`: a seed gives the same ones on every device."""
    if parameter.device.type == "cpu":
        yield parameter
        return
    values = torch.empty_like(parameter, device="cpu")
    yield values
    parameter.copy_(values)


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """One layer: a cell, a name in `CELLS`, with `rounds` rounds of mogrification in front.

    `rank` None means full-rank round matrices, else W = left @ right with inner size `rank`.
    `share_rounds` uses one matrix for all odd rounds and one for all even rounds.

    Initial values: `init` "uniform" is torch.nn.LSTM's, "melis2020" the released Mogrifier code's;
    `chrono_t_max` starts the forget bias at ln U(1, T_max - 1) and the input bias at its negative
    (Tallec and Ollivier, arXiv 1804.11188, eq. 16), for memories of up to T_max steps.

    Raises:
        ValueError: an unknown cell or init, a T_max for a cell that has no use for it, or a rank
            outside 1 to the smaller of input and hidden size. Other ranges are the caller's.
    """

    input_size: int
    hidden_size: int
    cell: str = "lstm"
    rounds: int = 0
    rank: int | None = None
    share_rounds: bool = False
    zigzag: bool = True
    round_bias: bool = True
    cap_input_gate: bool = False
    bias: bool = True
    init: str = "uniform"
    chrono_t_max: float | None = None

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"cell is {self.cell!r}, it must be one of {', '.join(CELLS)}")
        if self.init not in ("uniform", "melis2020"):
            raise ValueError(f"init is {self.init!r}, it must be uniform or melis2020")
        if self.chrono_t_max is not None and CELLS[self.cell].chrono_ is None:
            raise ValueError(f"chrono_t_max has no meaning for a {self.cell} cell: leave it out")
        largest = min(self.input_size, self.hidden_size)
        if self.rank is not None and not 1 <= self.rank <= largest:
            raise ValueError(
                f"rank is {self.rank}, it must lie between 1 and {largest}, the smaller of input "
                f"size {self.input_size} and hidden size {self.hidden_size} (null means full rank)"
            )

    @property
    def options(self) -> Options:
        """What the kernels are told besides the weights."""
        return Options(CELLS[self.cell].step, self.cell, self.zigzag, self.cap_input_gate)

    @property
    def state(self) -> tuple[str, ...]:
        """The names of the tensors that a step hands to the next."""
        return CELLS[self.cell].state

    def round_index(self, i: int) -> int:
        """Which matrix round i (from 1) uses: its own, or with sharing 1 (odd) or 2 (even)."""
        return (i - 1) % 2 + 1 if self.share_rounds else i

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name → shape, in a fixed order."""
        n_in, n = self.input_size, self.hidden_size
        shapes = CELLS[self.cell].shapes(n_in, n)
        if not self.bias:
            shapes = {k: v for k, v in shapes.items() if not k.startswith("bias")}
        for i in sorted({self.round_index(i) for i in range(1, self.rounds + 1)}):
            target, source = (n_in, n) if i % 2 else (n, n_in)
            if self.rank is None:
                shapes[f"round{i}_weight"] = (target, source)
            else:
                shapes[f"round{i}_left"] = (target, self.rank)
                shapes[f"round{i}_right"] = (self.rank, source)
            if self.round_bias:
                shapes[f"round{i}_bias"] = (target,)
        return shapes

    def num_params(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())

    @torch.no_grad()
    def init_(self, name: str, parameter: Tensor) -> None:
        """Initial value, in place.

        Cell, `init` "uniform": torch.nn.LSTM's, U(-1, 1) / sqrt(H). "melis2020" (LAMB):
        truncated normals of std sqrt(1.3 / fan_in), biases 0. Rounds, as in LAMB, near a gate of
        1: truncated normals of std sqrt(1.3 / fan_in) at full rank, (1 / (fan_in k))^(1/4) for
        each low-rank factor (fan_in of the whole matrix), biases 0.
        """
        with drawn_on_cpu(parameter) as values:
            self._draw(name, values)

    def _draw(self, name: str, parameter: Tensor) -> None:
        round_ = name.startswith("round")
        if parameter.dim() == 1 and (round_ or self.init == "melis2020"):  # a bias
            parameter.zero_()
        elif not round_ and self.init == "uniform":
            bound = 1 / math.sqrt(self.hidden_size)
            parameter.uniform_(-bound, bound)
        else:
            fan_in, rank = parameter.shape[1], None
            if round_:
                odd = int(name.removeprefix("round").split("_")[0]) % 2
                fan_in, rank = self.hidden_size if odd else self.input_size, self.rank
            std = math.sqrt(1.3 / fan_in) if rank is None else (1 / (fan_in * rank)) ** 0.25
            torch.nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        chrono_ = CELLS[self.cell].chrono_
        if name == "bias" and self.chrono_t_max is not None and chrono_ is not None:
            chrono_(parameter, self.chrono_t_max)

    def weights(self, parameters: Mapping[str, Tensor]) -> Weights:
        """The kernel's arguments out of named parameters."""
        rounds = []
        for i in range(1, self.rounds + 1):
            k = self.round_index(i)
            weight = f"round{k}_weight" if self.rank is None else f"round{k}_left"
            rounds.append(
                Round(
                    parameters[weight],
                    parameters.get(f"round{k}_right"),
                    parameters.get(f"round{k}_bias"),
                )
            )
        own = ("weight_ih", "weight_hh", "bias")
        names = CELLS[self.cell].shapes(self.input_size, self.hidden_size)
        return Weights(
            ih=parameters["weight_ih"],
            hh=parameters["weight_hh"],
            bias=parameters.get("bias"),
            rounds=tuple(rounds),
            more={k: parameters[k] for k in names if k not in own and k in parameters},
        )
