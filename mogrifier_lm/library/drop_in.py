"""`MogrifierLSTM`: a drop-in for torch.nn.LSTM with rounds of mogrification before each step."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mogrifier_lm.cells.spec import CellSpec
from mogrifier_lm.kernels import recurrence

State = tuple[Tensor, Tensor]
# (x [T, B, I], state) -> output [T, B, H], state: a layer's recurrence in one direction.
Run = Callable[[Tensor, State], tuple[Tensor, State]]


class MogrifierLSTM(nn.Module):
    """A stack of Mogrifier LSTM layers (Melis et al., arXiv 1909.01792) called as torch.nn.LSTM.

    With `rounds=0` (and no cap) it computes what torch.nn.LSTM computes and its `state_dict` is
    torch.nn.LSTM's, key for key. Under `torch.autocast` the products run in the autocast dtype.

    Args:
        input_size: I, features of x.
        hidden_size: H, features of h and c.
        num_layers: stacked layers, default 1.
        bias: LSTM biases, default True.
        batch_first: x and output are [B, T, ...]; default False.
        dropout: rate on the output of every layer but the last, in training mode; default 0.
        bidirectional: a second recurrence in each layer that reads x from its end, with parameters
            and rounds of its own (`..._l0_reverse`); the output is [T, B, 2H]. Default False.
        proj_size: as torch.nn.LSTM's, of which 0 alone is supported.
        device, dtype: of the parameters.
        rounds: r, gatings before each step; 0 is the LSTM. Default 5.
        backend: "auto", or a name in `mogrifier_lm.kernels.recurrence.BACKENDS`.
        options: further fields of `CellSpec`. rank: inner size of the round matrices, default None
            for full rank. share_rounds: one matrix for all odd rounds, one for all even ones,
            default False. zigzag: False conditions every round on the original x and h, default
            True. round_bias: a bias, initially 0, in each round's gate, default True (the paper
            has none, its released code has one). cap_input_gate: i is at most 1 - f, default False
            (the published results use it).

    Attributes:
        backend: the name of the one that runs; chosen when the module is built, and again when its
            parameters move to another device or dtype.

    Raises:
        ValueError: a size, rank, rate or backend that cannot be.
        TypeError: an unknown argument, or a `bias` that is not True or False.

    Example:
        >>> layer = MogrifierLSTM(input_size=10, hidden_size=20, rounds=5)
        >>> output, (h_n, c_n) = layer(torch.randn(7, 3, 10))     # [T, B, I] -> [T, B, H]
    """

    mode = "LSTM"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        rounds: int = 5,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(bias, bool):
            raise TypeError(f"bias is {bias!r}, it must be True or False; rounds is a keyword")
        counts = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for name, count, least in [*((k, n, 1) for k, n in counts.items()), ("rounds", rounds, 0)]:
            if count < least:
                raise ValueError(f"{name} is {count}, it must be at least {least}")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout}, it must lie between 0 and 1")
        if proj_size != 0:
            raise ValueError(f"proj_size is {proj_size}, but projections are not supported: give 0")
        if dropout and num_layers == 1:
            warnings.warn(
                f"dropout={dropout} stands between layers, and there is one layer", stacklevel=2
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, proj_size
        self.requested_backend = backend
        self.directions = (False, True) if bidirectional else (False,)
        below = [input_size, *[hidden_size * len(self.directions)] * (num_layers - 1)]
        self.specs = [
            CellSpec(input_size=i, hidden_size=hidden_size, cell="lstm", rounds=rounds, bias=bias,
                     **options)
            for i in below
        ]  # fmt: skip
        for index in self._indices():
            for name, shape in self.specs[index[0]].shapes().items():
                for key in _keys(name, *index):
                    value = torch.empty(shape, device=device, dtype=dtype)
                    self.register_parameter(key, nn.Parameter(value))
        self._resolve_backend()
        self.reset_parameters()

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM, **options: Any) -> Self:
        """A layer with the sizes and weights of a torch.nn.LSTM; `options` are rounds and so on."""
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout",
                 "bidirectional", "proj_size")  # fmt: skip
        p = next(lstm.parameters())
        arguments = {name: getattr(lstm, name) for name in names}
        layer = cls(**arguments, device=p.device, dtype=p.dtype, **options)
        layer.load_state_dict({**layer.state_dict(), **lstm.state_dict()})
        return layer

    @classmethod
    def from_moglstm(cls, state_dict: Mapping[str, Tensor], rounds: int, **options: Any) -> Self:
        """A layer with the weights of the community's MogLSTM(input_sz, hidden_sz, mog_iteration).

        That multiplies from the left (github RMichaelSwan/MogrifierLSTM).

        Args:
            state_dict: `Wih` [I, 4H], `Whh` [H, 4H], `bih`, `bhh` [4H], `Q` [H, I], `R` [I, H].
            rounds: its mog_iteration, which the weights do not tell.
            options: of this class.

        Returns:
            MogrifierLSTM(I, H, batch_first=True, rounds=rounds, share_rounds=True,
            round_bias=False) with these weights: one Q and R for all rounds, full rank.
        """
        w = {name: state_dict[name] for name in ("Wih", "Whh", "bih", "bhh", "Q", "R")}
        hidden, inputs = w["Q"].shape
        shared: dict[str, Any] = {"batch_first": True, "share_rounds": True, "round_bias": False}
        layer = cls(inputs, hidden, rounds=rounds, **shared, **options)
        values = {
            "weight_ih_l0": w["Wih"].T,
            "weight_hh_l0": w["Whh"].T,
            "bias_ih_l0": w["bih"],
            "bias_hh_l0": w["bhh"],
            "round1_weight_l0": w["Q"].T,
            "round2_weight_l0": w["R"].T,
        }
        layer.load_state_dict({name: values[name] for name in layer.state_dict()})
        return layer

    def _indices(self) -> list[tuple[int, bool]]:
        """(layer, reverse) of each recurrence, in the order of the states."""
        return [(layer, reverse) for layer in range(self.num_layers) for reverse in self.directions]

    def _resolve_backend(self) -> None:
        p = next(self.parameters())
        self.backend = recurrence.resolve(self.requested_backend, p.device, dtype=p.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # what .to(), .cuda() and .double() call
        self._resolve_backend()
        return self

    def reset_parameters(self) -> None:
        """Draw initial values; what a wrapper such as weight_norm has taken over stays as it is."""
        for index in self._indices():
            spec = self.specs[index[0]]
            for name in spec.shapes():
                for key in _keys(name, *index):
                    parameter = self._parameters.get(key)
                    if parameter is not None:
                        spec.init_(name, parameter)

    def flatten_parameters(self) -> None:
        """Nothing: torch.nn.LSTM's users call it, for cuDNN."""

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction."""
        return [
            [getattr(self, k) for name in self.specs[i].shapes() for k in _keys(name, i, reverse)]
            for i, reverse in self._indices()
        ]

    def _weights(self, layer: int, reverse: bool) -> recurrence.Weights:
        """The kernel's arguments, as attributes: wrappers put computed tensors in their place."""
        parameters = {}
        for name in self.specs[layer].shapes():
            value, *more = (getattr(self, key) for key in _keys(name, layer, reverse))
            parameters[name] = value + more[0] if more else value
        return self.specs[layer].weights(parameters)

    def round_matrices(
        self, layer: int = 0, reverse: bool = False
    ) -> list[tuple[Tensor, Tensor | None]]:
        """(weight [target, source], bias [target] or None) of each round, round 1 first.

        Dense, in torch.nn.Linear's orientation: round i multiplies its target by
        2 sigmoid(source @ weight.T + bias); a low-rank weight is multiplied out.
        """
        rounds = self._weights(layer, reverse).rounds
        return [(r.weight if r.right is None else r.weight @ r.right, r.bias) for r in rounds]

    def forward(
        self, input: Tensor | PackedSequence, hx: State | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run over time.

        Args:
            input: [T, B, I], [B, T, I] with `batch_first`, [T, I] for one sequence, or a
                PackedSequence.
            hx: (h_0, c_0), each [num_layers, B, H], or [num_layers, H] for one sequence; twice as
                many layers with `bidirectional`; default zeros.

        Returns:
            output [T, B, H] (or as input), and (h_n, c_n) shaped as the state: of a PackedSequence
            those after each sequence's own last step.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            if data.dim() != 2 or data.shape[1] != self.input_size:
                shape = tuple(data.shape)
                raise ValueError(f"packed data have shape {shape}, expected [N, {self.input_size}]")
            h, c = self._state(data, int(sizes[0]), hx, True)
            if order is not None:
                h, c = h.index_select(1, order), c.index_select(1, order)
            output, (h, c) = self._unroll(data, (h, c), sizes.tolist())
            if back is not None:
                h, c = h.index_select(1, back), c.index_select(1, back)
            return PackedSequence(output, sizes, order, back), (h, c)
        shape = tuple(input.shape)
        if input.dim() not in (2, 3) or shape[-1] != self.input_size:
            raise ValueError(
                f"x has shape {shape}, expected 2 or 3 dimensions, the last of size "
                f"{self.input_size}"
            )
        batched = input.dim() == 3
        x_TBI = input if batched else input.unsqueeze(1)
        x_TBI = x_TBI.transpose(0, 1) if self.batch_first and batched else x_TBI
        if x_TBI.shape[0] == 0:
            raise ValueError(f"x has shape {shape}, expected at least one time step")
        state = self._state(x_TBI, x_TBI.shape[1], hx, batched)
        output, (h, c) = self._unroll(x_TBI, state)
        if not batched:
            return output.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return output.transpose(0, 1) if self.batch_first else output, (h, c)

    def _state(self, x: Tensor, batch_size: int, hx: State | None, batched: bool) -> State:
        """h and c, each [num_layers * directions, B, H]."""
        layers, H = self.num_layers * len(self.directions), self.hidden_size
        if hx is None:
            zeros = x.new_zeros(layers, batch_size, H)
            return zeros, zeros
        if isinstance(hx, Tensor):
            raise TypeError("the state is one tensor, expected two: (h_0, c_0)")
        shape = (layers, batch_size, H) if batched else (layers, H)
        for name, s in zip(("h_0", "c_0"), hx, strict=True):
            if tuple(s.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(s.shape)}, expected {shape}")
        return hx if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))

    def _run_of(self, layer: int, reverse: bool) -> Run:
        weights, options = self._weights(layer, reverse), self.specs[layer].options

        def run(x: Tensor, state: State) -> tuple[Tensor, State]:
            output, (h, c) = recurrence.run(self.backend, x, state, weights, options)
            return output, (h, c)

        return run

    def _unroll(
        self, x: Tensor, state: State, sizes: Sequence[int] | None = None
    ) -> tuple[Tensor, State]:
        """All layers over x [T, B, I], or packed [N, I] with the batch size of each step."""
        h_n: list[Tensor] = []
        c_n: list[Tensor] = []
        for layer in range(self.num_layers):
            outputs = []
            for reverse in self.directions:
                run = self._run_of(layer, reverse)
                first = state[0][len(h_n)], state[1][len(h_n)]
                if sizes is None:
                    output, (h, c) = _one_way(run, x, first, reverse)
                else:
                    output, (h, c) = _packed(run, x, first, reverse, sizes)
                outputs.append(output)
                h_n.append(h)
                c_n.append(c)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if layer < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout, self.training)
        return x, (torch.stack(h_n), torch.stack(c_n))

    def extra_repr(self) -> str:
        options = vars(self.specs[0])
        names = ("rounds", "rank", "share_rounds", "zigzag", "round_bias", "cap_input_gate")
        own = ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
        values = {k: getattr(self, k) for k in own} | {k: options[k] for k in names}
        values["backend"] = self.backend
        pairs = ", ".join(f"{k}={v}" for k, v in values.items())
        return f"{self.input_size}, {self.hidden_size}, {pairs}"


def _keys(name: str, layer: int, reverse: bool) -> list[str]:
    """The parameters that `name` of a spec stands for.

    torch.nn.LSTM has two biases, of which only the sum matters.
    """
    names = ("bias_ih", "bias_hh") if name == "bias" else (name,)
    return [f"{n}_l{layer}{'_reverse' if reverse else ''}" for n in names]


def _one_way(run: Run, x: Tensor, state: State, reverse: bool) -> tuple[Tensor, State]:
    output, state = run(x.flip(0) if reverse else x, state)
    return output.flip(0) if reverse else output, state


def _packed(
    run: Run, data: Tensor, state: State, reverse: bool, sizes: Sequence[int]
) -> tuple[Tensor, State]:
    """Over sequences side by side, the longest first: a call for each stretch of equal batch size.

    What a sequence's last step leaves is set aside; backwards its first state joins there.
    """
    stretches: list[tuple[int, int, int]] = []  # first row of data, steps, batch size
    row = 0
    for size in sizes:
        first, steps, before = stretches.pop() if stretches else (row, 0, size)
        if before != size:
            stretches.append((first, steps, before))
            first, steps = row, 0
        stretches.append((first, steps + 1, size))
        row += size
    h, c = (s[: sizes[-1 if reverse else 0]] for s in state)
    outputs, ended = [], []
    for first, steps, size in stretches[::-1] if reverse else stretches:
        if size < len(h):
            ended.append((h[size:], c[size:]))
            h, c = h[:size], c[:size]
        elif size > len(h):
            joining = slice(len(h), size)
            h, c = (torch.cat((s, s0[joining])) for s, s0 in zip((h, c), state, strict=True))
        x = data[first : first + steps * size].view(steps, size, -1)
        output, (h, c) = _one_way(run, x, (h, c), reverse)
        outputs.append(output.flatten(0, 1))
    h, c = (torch.cat(s) for s in zip((h, c), *ended[::-1], strict=True))
    return torch.cat(outputs[::-1] if reverse else outputs), (h, c)
