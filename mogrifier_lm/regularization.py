"""Regularization as masks that are drawn first and passed in: the model itself holds no randomness.

Sources: locked dropout, embedding dropout, DropConnect on hidden-to-hidden weights, AR and TAR are
AWD-LSTM's (Merity et al., arXiv 1708.02182, section 4); dropout drawn per time step beside a state
mask per window is LAMB's (Melis et al., arXiv 1909.01792, released code).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mogrifier_lm.options import RegularizationConfig

# What is multiplied, "state.1" say → the multipliers, scaled by 1 / (1 - rate).
Masks = Mapping[str, Tensor]

# Kinds whose masks are of weights, and so the same for all streams.
SHARED = ("embedding", "weight")


def kind(name: str) -> str:
    """Of a mask: "state" of "state.1"; its rate is the option `regularization.state_dropout`."""
    return name.partition(".")[0]


def scaled(config: RegularizationConfig, factor: float) -> RegularizationConfig:
    """The same with every dropout rate times `factor`."""
    rates = {k: v * factor for k, v in vars(config).items() if k.endswith("_dropout")}
    return replace(config, **rates)


def masked(config: RegularizationConfig, shapes: Iterable[str]) -> list[str]:
    """The names, out of those in `shapes`, of the masks that are drawn: of a rate above 0."""
    return [name for name in shapes if getattr(config, f"{kind(name)}_dropout") > 0]


def draw_masks(
    config: RegularizationConfig,
    shapes: Mapping[str, tuple[int, ...]],
    size: tuple[int, int],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Bernoulli masks for one window: those that `masked` names.

    Masks of weights are shaped as they are, and those of the state [1, B, H]: one for the window.
    The others are [1, B, features] (locked, as in AWD-LSTM) or, with `config.per_step`, drawn for
    each step (as in LAMB): [T, B, features].

    Args:
        config: rates in [0, 1).
        shapes: mask → weights or features that it covers, see `LanguageModel.mask_shapes`.
        size: (T, B).
        generator: on the device that the masks are for.
    """
    num_steps, batch_size = size
    masks = {}
    for name in masked(config, shapes):
        rate, shape = getattr(config, f"{kind(name)}_dropout"), shapes[name]
        if kind(name) not in SHARED:
            steps = num_steps if config.per_step and kind(name) != "state" else 1
            shape = (steps, batch_size, *shape)
        mask = torch.empty(shape, device=generator.device)
        masks[name] = mask.bernoulli_(1 - rate, generator=generator).div_(1 - rate)
    return masks


def of_streams(masks: Masks, columns: slice) -> dict[str, Tensor]:
    """The masks of some of the streams."""
    return {k: mask if kind(k) in SHARED else mask[:, columns] for k, mask in masks.items()}


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
