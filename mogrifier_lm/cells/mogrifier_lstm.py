"""`MogrifierLSTM`: a drop-in for torch.nn.LSTM with rounds of mogrification before each step."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mogrifier_lm.cells.spec import CellSpec
from mogrifier_lm.kernels import recurrence


class MogrifierLSTM(nn.Module):
    """A stack of Mogrifier LSTM layers (Melis et al., arXiv 1909.01792) called as torch.nn.LSTM.

    With `rounds=0` (and no cap) it computes what torch.nn.LSTM computes and its `state_dict` is
    torch.nn.LSTM's, key for key. Under `torch.autocast` the products run in the autocast dtype.

    Args:
        input_size: I, features of x.
        hidden_size: H, features of h and c.
        num_layers: stacked layers, default 1.
        rounds: r, gatings before each step; 0 is the LSTM. Default 5.
        rank: inner size of the round matrices, None (default) for full rank.
        share_rounds: one matrix for all odd rounds, one for all even ones; default False.
        zigzag: False conditions every round on the original x and h; default True.
        round_bias: a bias, initially 0, in each round's gate; default True (the paper has none,
            its released code has one).
        cap_input_gate: i is at most 1 - f; default False (the published results use it).
        bias: LSTM biases, default True.
        batch_first: x and output are [B, T, ...]; default False.
        dropout: rate on the output of every layer but the last, in training mode; default 0.
        backend: "auto", or a name in `mogrifier_lm.kernels.recurrence.BACKENDS`.

    Attributes:
        backend: the name of the one that runs; chosen when the module is built, and again when its
            parameters move to another device or dtype.

    Raises:
        ValueError: a size, rank, rate or backend that cannot be.

    Example:
        >>> layer = MogrifierLSTM(input_size=10, hidden_size=20, rounds=5)
        >>> output, (h_n, c_n) = layer(torch.randn(7, 3, 10))     # [T, B, I] -> [T, B, H]
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        rounds: int = 5,
        rank: int | None = None,
        share_rounds: bool = False,
        zigzag: bool = True,
        round_bias: bool = True,
        cap_input_gate: bool = False,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}, it must be at least 1")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout}, it must lie between 0 and 1")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout = batch_first, dropout
        self.requested_backend = backend
        self.specs = [
            CellSpec(
                input_size=input_size if layer == 0 else hidden_size,
                hidden_size=hidden_size,
                rounds=rounds,
                rank=rank,
                share_rounds=share_rounds,
                zigzag=zigzag,
                round_bias=round_bias,
                cap_input_gate=cap_input_gate,
                bias=bias,
            )
            for layer in range(num_layers)
        ]
        for layer, spec in enumerate(self.specs):
            for name, shape in spec.shapes().items():
                # torch.nn.LSTM has two biases, of which only the sum matters.
                for key in ("bias_ih", "bias_hh") if name == "bias" else (name,):
                    self.register_parameter(f"{key}_l{layer}", nn.Parameter(torch.empty(shape)))
        self._resolve_backend()
        self.reset_parameters()

    def _resolve_backend(self) -> None:
        p = next(self.parameters())
        self.backend = recurrence.resolve(self.requested_backend, p.device, dtype=p.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # what .to(), .cuda() and .double() call
        self._resolve_backend()
        return self

    def reset_parameters(self) -> None:
        for key, parameter in self.named_parameters():
            name, layer = key.rsplit("_l", 1)
            self.specs[int(layer)].init_(name, parameter)

    def _parameters_of(self, layer: int) -> dict[str, Tensor]:
        suffix = f"_l{layer}"
        parameters: dict[str, Tensor] = {
            key.removesuffix(suffix): value
            for key, value in self.named_parameters()
            if key.endswith(suffix)
        }
        if self.specs[layer].bias:
            parameters["bias"] = parameters.pop("bias_ih") + parameters.pop("bias_hh")
        return parameters

    def round_matrices(self, layer: int = 0) -> list[tuple[Tensor, Tensor | None]]:
        """(weight [target, source], bias [target] or None) of each round, round 1 first.

        Dense, in torch.nn.Linear's orientation: round i multiplies its target by
        2 sigmoid(source @ weight.T + bias); a low-rank weight is multiplied out.
        """
        rounds = self.specs[layer].weights(self._parameters_of(layer)).rounds
        return [(r.weight if r.right is None else r.weight @ r.right, r.bias) for r in rounds]

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over time.

        Args:
            x: [T, B, I], [B, T, I] with `batch_first`, or [T, I] for one sequence.
            state: (h_0, c_0), each [num_layers, B, H], or [num_layers, H] for one sequence;
                default zeros.

        Returns:
            output [T, B, H] (or as x), and (h_n, c_n) shaped as the state.

        Raises:
            TypeError: a packed sequence; pad it, and mask the loss.
            ValueError: shapes that do not fit.
        """
        if isinstance(x, PackedSequence):
            raise TypeError(
                "MogrifierLSTM does not take a PackedSequence: pass the padded batch and mask the "
                "loss (outputs at earlier steps do not depend on the padding after them)"
            )
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected 2 or 3 dimensions, the last of size "
                f"{self.input_size}"
            )
        batched = x.dim() == 3
        x_TBI = (x.transpose(0, 1) if self.batch_first else x) if batched else x.unsqueeze(1)
        if x_TBI.shape[0] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected at least one time step")
        expected = (self.num_layers, x_TBI.shape[1], self.hidden_size)
        if state is None:
            h_LBH = c_LBH = x_TBI.new_zeros(expected)
        else:
            shape = expected if batched else (expected[0], expected[2])
            for name, s in zip(("h_0", "c_0"), state, strict=True):
                if tuple(s.shape) != shape:
                    raise ValueError(f"{name} has shape {tuple(s.shape)}, expected {shape}")
            h_LBH, c_LBH = state if batched else (s.unsqueeze(1) for s in state)
        h_n, c_n = [], []
        for layer, spec in enumerate(self.specs):
            weights = spec.weights(self._parameters_of(layer))
            state = h_LBH[layer], c_LBH[layer]
            x_TBI, (h, c) = recurrence.run(self.backend, x_TBI, state, weights, spec.options)
            h_n.append(h)
            c_n.append(c)
            if layer < self.num_layers - 1:
                x_TBI = nn.functional.dropout(x_TBI, self.dropout, self.training)
        state_n = (torch.stack(h_n), torch.stack(c_n))
        if not batched:
            return x_TBI.squeeze(1), (state_n[0].squeeze(1), state_n[1].squeeze(1))
        return x_TBI.transpose(0, 1) if self.batch_first else x_TBI, state_n

    def extra_repr(self) -> str:
        values: dict[str, Any] = vars(self.specs[0])
        rounds = ", ".join(f"{k}={values[k]}" for k in ("rounds", "rank", "share_rounds", "zigzag"))
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, {rounds}, "
            f"backend={self.backend}"
        )
