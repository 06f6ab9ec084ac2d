"""Checkpoints: tensors and plain values in one safetensors file, written whole or not at all.

Nothing is pickled, so a file from a stranger cannot run code.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mogrifier_lm.errors import UserError, one_line
from mogrifier_lm.files import replacing

if TYPE_CHECKING:
    from mogrifier_lm.model import LanguageModel


def save(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        UserError: it cannot be written, because the disk is full, say.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as new:
        safetensors.torch.save_file(contiguous, new, metadata={"values": json.dumps(values)})


def load(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of a file that `save` wrote.

    Raises:
        UserError: no such file, or one that is damaged.
    """
    with _opened(path, device) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        values = json.loads(file.metadata()["values"])
        if not isinstance(values, dict):
            raise ValueError("its values are no object")
        return tensors, values


@contextmanager
def _opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}") from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the checkpoint {path} is damaged: {one_line(error)}") from error


def weight_shapes(path: Path) -> list[list[int]]:
    """The shapes of the model's weights in a file that `save` wrote, from its header alone.

    Raises:
        UserError: no such file, or one that is damaged.
    """
    with _opened(path) as file:
        names = file.keys()
        weights = [name for name in names if name.startswith("model.")] or names
        return [file.get_slice(name).get_shape() for name in weights]


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer keeps of each parameter: optimizer.INDEX.SLOT → values."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{slot}": value
        for index, slots in state.items()
        for slot, value in slots.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give back what `optimizer_tensors` took, found among other tensors."""
    state = optimizer.state_dict()
    for key, value in part(tensors, "optimizer.").items():
        index, slot = key.split(".")
        state["state"].setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict(state)


def load_weights(model: "LanguageModel", path: Path) -> None:
    """Put the weights that a run has kept into a model of the same shapes.

    Raises:
        UserError: no such file, one of another model, or one that holds no numbers.
    """
    tensors, _ = load(path, str(model.output_bias.device))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path} does not fit this model: {reason}") from error
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path} is damaged: {bad[0]} holds NaN or infinite weights")
