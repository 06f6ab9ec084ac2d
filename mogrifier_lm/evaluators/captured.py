"""The model without gradient, on a GPU as one captured graph for each shape of a window."""

import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from mogrifier_lm.cells import RecurrentLayer, State
from mogrifier_lm.kernels.graphs import Graphed
from mogrifier_lm.model import LanguageModel, States

_graphs: weakref.WeakKeyDictionary[LanguageModel, dict[Hashable, Graphed]] = (
    weakref.WeakKeyDictionary()
)


@torch.no_grad()
def encode(
    model: LanguageModel,
    inputs_TB: Tensor,
    states: States,
    masks: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, States]:
    """As `model.encode`, which documents the arguments, without gradient."""
    masks, graphs = masks or {}, _graphs.setdefault(model, {})
    names, sizes = tuple(masks), [len(state) for state in states]
    key = names, _fixed(model)
    if key not in graphs:
        known = weakref.proxy(model)  # which the graphs would keep alive

        def function(inputs_TB: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            flat, drawn = tensors[: sum(sizes)], tensors[sum(sizes) :]
            given = dict(zip(names, drawn, strict=True))
            hidden, new = known.encode(inputs_TB, nested(flat, sizes), given)
            return hidden, *flattened(new)

        graphs[key] = Graphed(function, inputs_TB.device)
    hidden, *flat = graphs[key](inputs_TB, *flattened(states), *masks.values())
    return hidden, nested(flat, sizes)


def flattened(states: States) -> list[Tensor]:
    return [tensor for state in states for tensor in state]


def nested(flat: Iterable[Tensor], sizes: Sequence[int]) -> States:
    """States of so many tensors each: what `flattened` was given."""
    tensors = iter(flat)
    return [cast(State, tuple(next(tensors) for _ in range(size))) for size in sizes]


def _fixed(model: LanguageModel) -> Hashable:
    """What a captured graph depends on besides its arguments: layers, places, precision."""
    specs = tuple(cast(RecurrentLayer, layer).spec for layer in model.layers)
    places = tuple(p.data_ptr() for p in model.parameters())
    device = model.output_bias.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return specs, places, autocast
