"""Regularization as masks that are drawn first and passed in: the model itself holds no randomness.

Sources: locked dropout, embedding dropout, DropConnect on hidden-to-hidden weights, AR and TAR are
AWD-LSTM's (Merity et al., arXiv 1708.02182, section 4); dropout drawn per time step beside a state
mask per window is LAMB's (Melis et al., arXiv 1909.01792, released code).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mogrifier_lm.options import RegularizationConfig


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Dropout rates in [0, 1). `per_step`: input, inter-layer and output masks are drawn for
    every time step (as in LAMB) and not once per window (locked, as in AWD-LSTM); the others are
    always shared over the window."""

    embedding: float = 0.0
    input: float = 0.0
    inter_layer: float = 0.0
    state: float = 0.0
    output: float = 0.0
    weight: float = 0.0
    per_step: bool = False

    def scaled(self, factor: float) -> "Rates":
        """Every rate times `factor`."""
        rates = {k: v * factor for k, v in vars(self).items() if k != "per_step"}
        return replace(self, **rates)


def build_rates(config: RegularizationConfig) -> Rates:
    return Rates(
        embedding=config.embedding_dropout,
        input=config.input_dropout,
        inter_layer=config.inter_layer_dropout,
        state=config.state_dropout,
        output=config.output_dropout,
        weight=config.weight_dropout,
        per_step=config.per_step,
    )


class MaskSizes(NamedTuple):
    """What the masks of a model cover: types, features, and [rows, H] of each `weight_hh`."""

    vocabulary: int
    embedding: int
    hidden: Sequence[int]
    output: int
    weights: Sequence[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Multipliers, already scaled by 1 / (1 - rate); None drops nothing.

    Shapes: `embedding` [V, 1], whole words dropped from the embedding (not from the output layer
    that shares its matrix); then [1 or T, B, features]: `input` on the embedding's output,
    `inter_layer[i]` on the output of layer i on its way to layer i + 1, `state[i]` on the h that
    enters each step of layer i (always [1, B, H]), `output` on the encoder's output; and
    `weight[i]`, shaped as layer i's `weight_hh`.
    """

    embedding: Tensor | None = None
    input: Tensor | None = None
    inter_layer: Sequence[Tensor | None] = field(default_factory=tuple)
    state: Sequence[Tensor | None] = field(default_factory=tuple)
    output: Tensor | None = None
    weight: Sequence[Tensor | None] = field(default_factory=tuple)

    def flatten(self) -> tuple[Tensor | None, ...]:
        """The masks as one tuple, for functions of tensors alone."""
        return self.embedding, self.input, *self.inter_layer, *self.state, self.output, *self.weight

    def columns(self, columns: slice) -> "Masks":
        """Those of some of the streams."""

        def cut(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else mask[:, columns]

        return replace(
            self,
            input=cut(self.input),
            inter_layer=[cut(mask) for mask in self.inter_layer],
            state=[cut(mask) for mask in self.state],
            output=cut(self.output),
        )

    @classmethod
    def unflatten(cls, masks: Sequence[Tensor | None]) -> "Masks":
        """The masks of `flatten`: with L layers there are 2 + (L - 1) + L + 1 + L."""
        layers = (len(masks) - 2) // 3
        return cls(
            embedding=masks[0],
            input=masks[1],
            inter_layer=masks[2 : layers + 1],
            state=masks[layers + 1 : 2 * layers + 1],
            output=masks[2 * layers + 1],
            weight=masks[2 * layers + 2 :],
        )


def draw_masks(
    rates: Rates, sizes: MaskSizes, shape: tuple[int, int], generator: torch.Generator
) -> Masks:
    """Bernoulli masks for one window.

    Args:
        rates: of each kind.
        sizes: of the model, see `LanguageModel.mask_sizes`.
        shape: (T, B).
        generator: on the device that the masks are for.
    """
    num_steps, batch_size = shape

    def draw(rate: float, *size: int) -> Tensor | None:
        if rate == 0:
            return None
        mask = torch.empty(size, device=generator.device)
        return mask.bernoulli_(1 - rate, generator=generator).div_(1 - rate)

    steps = num_steps if rates.per_step else 1
    return Masks(
        embedding=draw(rates.embedding, sizes.vocabulary, 1),
        input=draw(rates.input, steps, batch_size, sizes.embedding),
        inter_layer=[draw(rates.inter_layer, steps, batch_size, h) for h in sizes.hidden[:-1]],
        state=[draw(rates.state, 1, batch_size, h) for h in sizes.hidden],
        output=draw(rates.output, steps, batch_size, sizes.output),
        weight=[draw(rates.weight, *size) for size in sizes.weights],
    )


def drop(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def activation_penalty(output_TBH: Tensor, dropped_TBH: Tensor, ar: float, tar: float) -> Tensor:
    """AR and TAR: ar * mean(dropped^2) + tar * mean((output[t + 1] - output[t])^2).

    Args:
        output_TBH: the encoder's output before its dropout.
        dropped_TBH: after it.
        ar: alpha of AWD-LSTM.
        tar: beta of AWD-LSTM; a window of one step has no such term.
    """
    penalty = output_TBH.new_zeros((), dtype=torch.float32)
    if ar:
        penalty = penalty + ar * dropped_TBH.float().square().mean()
    if tar and len(output_TBH) > 1:
        penalty = penalty + tar * output_TBH.float().diff(dim=0).square().mean()
    return penalty
