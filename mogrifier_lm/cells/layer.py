"""One recurrent layer that owns its parameters."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from mogrifier_lm.cells.spec import CellSpec
from mogrifier_lm.kernels import recurrence
from mogrifier_lm.kernels.recurrence import State


class RecurrentLayer(nn.Module):
    """A layer of the kind that `spec` describes, run by one backend chosen when it is built.

    Args:
        spec: cell, sizes and rounds.
        backend: "auto" or a name in `kernels.recurrence.BACKENDS`.
        device: where the parameters live, default cpu.

    Attributes:
        backend: the name of the one that runs; chosen when the layer is built, and again when its
            parameters move to another device or dtype.

    Raises:
        ValueError: a backend that cannot run such a layer, when it is built or moved.
    """

    weight_hh: nn.Parameter

    def __init__(self, spec: CellSpec, backend: str = "auto", device: str = "cpu") -> None:
        super().__init__()
        self.spec = spec
        self.requested_backend = backend
        for name, shape in spec.shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device)))
        self._resolve_backend()
        if device != "meta":
            self.reset_parameters()

    def _resolve_backend(self) -> None:
        p = self.weight_hh
        self.backend = recurrence.resolve(
            self.requested_backend, p.device, cell=self.spec.cell, dtype=p.dtype
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # what .to(), .cuda() and .double() call
        self._resolve_backend()
        return self

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            self.spec.init_(name, parameter)

    def forward(
        self,
        x: Tensor,
        state: State,
        state_mask: Tensor | None = None,
        weight_mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Run over time.

        Args:
            x: [T, B, I].
            state: of the cell, (h, c) of an LSTM, [B, H] each.
            state_mask: [1 or T, B, H], see `kernels.recurrence`.
            weight_mask: DropConnect, shaped as `weight_hh`, which it multiplies.

        Returns:
            output [T, B, H] and the state after the last step.
        """
        weights = self.weights(weight_mask)
        return recurrence.run(self.backend, x, state, weights, self.spec.options, state_mask)

    def weights(self, weight_mask: Tensor | None = None) -> recurrence.Weights:
        """The kernel's arguments; `weight_mask` as in `forward`."""
        parameters: dict[str, Tensor] = dict(self.named_parameters())
        if weight_mask is not None:
            parameters["weight_hh"] = parameters["weight_hh"] * weight_mask
        return self.spec.weights(parameters)

    def zero_state(self, batch_size: int) -> State:
        size = batch_size, self.spec.hidden_size
        return tuple(self.weight_hh.new_zeros(size) for _ in self.spec.state)

    def extra_repr(self) -> str:
        return f"{self.spec}, backend={self.backend}"
