"""One recurrent layer that owns its parameters."""

import torch
from torch import Tensor, nn

from mogrifier_lm.cells.spec import CellSpec
from mogrifier_lm.kernels import recurrence

State = tuple[Tensor, Tensor]


class RecurrentLayer(nn.Module):
    """A layer of the kind that `spec` describes, run by one backend chosen when it is built.

    Args:
        spec: cell, sizes and rounds.
        backend: "auto" or a name in `kernels.recurrence.BACKENDS`.
        device: where the parameters live, default cpu.
    """

    def __init__(self, spec: CellSpec, backend: str = "auto", device: str = "cpu") -> None:
        super().__init__()
        self.spec = spec
        self.backend = recurrence.resolve(backend, device)
        for name, shape in spec.shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            self.spec.init_(name, parameter)

    def forward(
        self, x: Tensor, state: State, state_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x [T, B, I], state (h, c) [B, H] each, mask [1 or T, B, H] → output [T, B, H], state."""
        output, h, c = recurrence.BACKENDS[self.backend](
            x,
            *state,
            self.spec.weights(dict(self.named_parameters())),
            cell=self.spec.cell,
            zigzag=self.spec.zigzag,
            cap_input_gate=self.spec.cap_input_gate,
            state_mask=state_mask,
        )
        return output, (h, c)

    def zero_state(self, batch_size: int) -> State:
        zeros = self.weight_hh.new_zeros(batch_size, self.spec.hidden_size)
        return zeros, zeros.clone()

    def extra_repr(self) -> str:
        return f"{self.spec}, backend={self.backend}"
