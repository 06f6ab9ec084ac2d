"""Dropout as masks that are drawn first and passed in: the model itself holds no randomness."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Dropout rates in [0, 1). `per_step`: input, inter-layer and output masks are drawn for
    every time step (as in LAMB) and not once per window (locked, as in AWD-LSTM); the state
    mask is always shared over the window."""

    input: float = 0.0
    inter_layer: float = 0.0
    state: float = 0.0
    output: float = 0.0
    per_step: bool = False

    def scaled(self, factor: float) -> "Rates":
        """Every rate times `factor`."""
        rates = {k: v * factor for k, v in vars(self).items() if k != "per_step"}
        return replace(self, **rates)


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Multipliers, already scaled by 1 / (1 - rate); None drops nothing.

    Shapes [1 or T, B, features]: `input` on the embedding's output, `inter_layer[i]` on the
    output of layer i on its way to layer i + 1, `state[i]` on the h that enters each step of
    layer i (always [1, B, H]), `output` on the encoder's output.
    """

    input: Tensor | None = None
    inter_layer: Sequence[Tensor | None] = field(default_factory=tuple)
    state: Sequence[Tensor | None] = field(default_factory=tuple)
    output: Tensor | None = None

    def flatten(self) -> tuple[Tensor | None, ...]:
        """The masks as one tuple, for functions of tensors alone."""
        return self.input, *self.inter_layer, *self.state, self.output

    @classmethod
    def unflatten(cls, masks: Sequence[Tensor | None]) -> "Masks":
        """The masks of `flatten`: with L layers there are 1 + (L - 1) + L + 1."""
        layers = (len(masks) - 1) // 2
        return cls(
            input=masks[0], inter_layer=masks[1:layers], state=masks[layers:-1], output=masks[-1]
        )


def draw_masks(
    rates: Rates,
    sizes: tuple[int, Sequence[int], int],
    shape: tuple[int, int],
    generator: torch.Generator,
) -> Masks:
    """Bernoulli masks for one window.

    Args:
        rates: of each kind.
        sizes: features of the embedding, of each layer, of the encoder's output.
        shape: (T, B).
        generator: on the device that the masks are for.
    """
    embedding_size, layer_sizes, output_size = sizes
    num_steps, batch_size = shape

    def draw(rate: float, features: int, steps: int) -> Tensor | None:
        if rate == 0:
            return None
        mask = torch.empty(steps, batch_size, features, device=generator.device)
        return mask.bernoulli_(1 - rate, generator=generator).div_(1 - rate)

    steps = num_steps if rates.per_step else 1
    return Masks(
        input=draw(rates.input, embedding_size, steps),
        inter_layer=[draw(rates.inter_layer, size, steps) for size in layer_sizes[:-1]],
        state=[draw(rates.state, size, 1) for size in layer_sizes],
        output=draw(rates.output, output_size, steps),
    )
