"""Checkpoints: tensors and plain values in one safetensors file, written whole or not at all.

Nothing is pickled, so a file from a stranger cannot run code.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mogrifier_lm.errors import UserError, one_line

if TYPE_CHECKING:
    from mogrifier_lm.model import LanguageModel

BEST = Path("checkpoints", "best", "model.safetensors")
LAST = Path("checkpoints", "last", "state.safetensors")


def save(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write under a temporary name, then rename: a kill at any moment leaves the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".tmp")
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, tmp, metadata={"values": json.dumps(values)})
    os.replace(tmp, path)


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
        weights = [n for n in names if path.name == BEST.name or n.startswith("model.")]
        return [file.get_slice(name).get_shape() for name in weights]


def load_weights(model: "LanguageModel", run_dir: Path) -> None:
    """Put a run's best weights by validation perplexity into a model of the same shapes.

    Raises:
        UserError: no such file, one of another model, or one that holds no numbers.
    """
    path = run_dir / BEST
    tensors, _ = load(path, str(model.output_bias.device))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path} does not fit this model: {reason}") from error
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path} is damaged: {bad[0]} holds NaN or infinite weights")
