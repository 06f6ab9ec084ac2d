"""Checkpoints: tensors and plain values in one safetensors file, written whole or not at all.

Nothing is pickled, so a file from a stranger cannot run code. A checksum of the whole file stands
in its header: what a disk or a copy has damaged is refused, not computed with.
"""

import json
import logging
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mogrifier_lm.errors import UserError, one_line
from mogrifier_lm.files import MAX_JSON, flush, parse_json, replacing
from mogrifier_lm.training.parallel import Processes

if TYPE_CHECKING:
    from mogrifier_lm.model import LanguageModel

log = logging.getLogger(__name__)

# As safetensors calls them.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CHECKSUM, UNKNOWN = "crc32", "00000000"
CHUNK = 2**20  # bytes read at once


def save(
    path: Path,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    previous: Path | None = None,
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: its file.
        tensors: of any shape and device.
        values: plain ones.
        previous: where the checkpoint that was there is kept, as long as the file system can give
            a file two names; for `load` to go back to if the new one is damaged later.

    Raises:
        UserError: it cannot be written, because the disk is full, say.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        with open(new, "wb") as file:
            _write(file, tensors, values)
        if previous:
            with suppress(UserError), replacing(previous) as second:
                os.link(path, second)


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write tensor by tensor; the library's writer leaves a nameless file where it is killed."""
    # Aligned: the wide ones first, as the library has it.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"values": json.dumps(values), CHECKSUM: UNKNOWN}}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    crc = zlib.crc32(text)
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().data if flat.numel() else b""
        file.write(data)
        crc = zlib.crc32(data, crc)
    file.seek(8)
    file.write(text.replace(_entry(UNKNOWN), _entry(f"{crc:08x}"), 1))


def _entry(checksum: str) -> bytes:
    """As it stands in the header."""
    return f'"{CHECKSUM}": "{checksum}"'.encode()


def _verify(path: Path) -> None:
    """Compare a file with its checksum; one of an older version has none.

    Raises:
        ValueError: they differ.
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(min(length, MAX_JSON + 1))
        known = parse_json(header)["__metadata__"].get(CHECKSUM)
        if known is None:
            return
        crc = zlib.crc32(header.replace(_entry(known), _entry(UNKNOWN), 1))
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    if known != f"{crc:08x}":
        raise ValueError("its checksum is another one")


def load(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of a file that `save` wrote.

    Raises:
        UserError: no such file, or one that is damaged.
    """
    with _opened(path, device) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, {**parse_json(file.metadata()["values"].encode(), finite=False)}


@contextmanager
def _opened(path: Path, device: str = "cpu", verify: bool = True) -> Iterator[Any]:
    try:
        if verify:
            _verify(path)
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}") from error
    except (
        SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, struct.error,
        RuntimeError,
    ) as error:  # fmt: skip
        raise UserError(f"the checkpoint {path} is damaged: {one_line(error)}") from error


def whole(last: Path, previous: Path) -> Path:
    """The checkpoint to go on from: the last, or where it is damaged the one before it.

    Raises:
        UserError: neither is whole.
    """
    try:
        with _opened(last):
            return last
    except UserError as error:
        with suppress(UserError), _opened(previous):
            return previous
        raise error


def weight_shapes(path: Path) -> list[list[int]]:
    """The shapes of the model's weights in a file that `save` wrote, from its header alone.

    Raises:
        UserError: no such file, or one that is damaged.
    """
    with _opened(path, verify=False) as file:  # it would read all of it
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
    """Give back what `optimizer_tensors` took, found among other tensors.

    Raises:
        ValueError: it is another optimizer's, or that of other parameters.
    """
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in part(tensors, "optimizer.").items():
        index, slot = key.split(".")
        parameter = parameters[int(index)]
        if slot != "step":  # the fused updates read as many numbers as the parameter has
            check_shape(f"optimizer.{key}", value, parameter)
        state["state"].setdefault(int(index), {})[slot] = value
    means = set() if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
    slots = [set(state["state"].get(i, ())) for i in range(len(parameters))]
    if any(slots) and any(found != means for found in slots):
        raise ValueError(f"the state is not one of {type(optimizer).__name__}")
    optimizer.load_state_dict(state)


def check_shape(name: str, saved: Tensor, place: Tensor) -> None:
    """Raises `ValueError` where a saved tensor is not what its place takes; copying may not."""
    if saved.shape != place.shape or saved.is_floating_point() != place.is_floating_point():
        raise ValueError(f"{name} is {saved.dtype} {[*saved.shape]}, it must be {[*place.shape]}")


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


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


class Files(Protocol):
    """Where a trainer writes: of a run's folder, see `runs.folder.RunFolder`."""

    metrics: Path  # a line for each event
    best: Path  # the best weights
    last: Path  # all that the next step depends on
    previous: Path  # the last but one

    def rows(self, with_key: str) -> Iterator[dict[str, Any]]: ...  # of metrics


def _at(path: Path, step: int | str) -> Path:
    """The name of a checkpoint that is kept of a validation."""
    return path.with_name(f"step-{step}{path.suffix}")


class Checkpoints:
    """The checkpoints of a run. Each is one moment: it holds the best weights of then, too.

    The file of the best weights follows from it and is written after it, so that no kill leaves
    best weights from a future that a resumed run has not seen. Training waits for a copy in memory,
    not for the disk, which takes seconds where the machine is busy: a thread writes.

    Args:
        files: where they lie.
        last, best: of how many validations checkpoints and weights are kept beside them.
    """

    def __init__(self, files: Files, last: int = 1, best: int = 1) -> None:
        self.files = files
        self._numbers = {files.last: last, files.best: best}
        self._best: dict[str, Tensor] = {}
        self._best_values: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing = self._thread.submit(lambda: None)

    def keep_best(self, model: "LanguageModel", values: Mapping[str, Any]) -> None:
        """Take a copy of the weights as the best so far."""
        self._best, self._best_values = _copies(model.state_dict()), dict(values)

    def keep_weights(self, model: "LanguageModel", values: Mapping[str, Any]) -> None:
        """Write the weights of a validation, where several are kept; `settle` leaves the best."""
        if self._numbers[self.files.best] > 1:
            self.close()
            save(_at(self.files.best, values["step"]), model.state_dict(), values)

    def settle(self, step: int) -> None:
        """Leave those of the last and the best validations up to this step, so many of each."""
        if max(self._numbers.values()) == 1:
            return
        rows = self.files.rows("valid/ppl")
        ppls = {row["step"]: row["valid/ppl"] for row in rows if row["step"] <= step}
        by_ppl = sorted(ppls, key=ppls.__getitem__)
        orders = {self.files.last: [*reversed(ppls)], self.files.best: by_ppl}
        for path, number in self._numbers.items():
            kept = {_at(path, step) for step in orders[path][: number if number > 1 else 0]}
            for other in {*path.parent.glob(_at(path, "*").name)} - kept:
                other.unlink()
            if path == self.files.last and (place := _at(path, step)) in kept:
                with replacing(place) as new:
                    shutil.copyfile(path, new)

    def restore_best(self, model: "LanguageModel") -> None:
        """Put the best weights back into the model."""
        model.load_state_dict(self._best)

    def save(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint of this moment, once the one before it, which is kept, is.

        Raises:
            UserError: the one before it could not be written.
        """
        self.close()
        best = {f"best.{name}": tensor for name, tensor in self._best.items()}
        values = {**values, "best": self._best_values}
        self._writing = self._thread.submit(self._write, _copies(tensors) | best, values)

    def _write(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        if self.files.metrics.is_file():
            flush(self.files.metrics)  # before what counts its lines
        save(self.files.last, tensors, values, self.files.previous)
        if values["best"].get("step") == values["progress"]["step"]:  # it is new
            save(self.files.best, part(tensors, "best."), values["best"])
        self.settle(values["progress"]["step"])

    def close(self, wait: bool = True) -> None:
        """See that the last checkpoint is on the disk; without `wait`, if it is done.

        Raises:
            UserError: it could not be written.
        """
        if wait or self._writing.done():
            self._writing.result()

    def load(self, processes: Processes) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The last checkpoint or, with a line that says so, the one before where it is damaged.

        The other files are brought to its moment by the first of the processes.

        Raises:
            UserError: neither is whole.
        """
        path = whole(self.files.last, self.files.previous)
        tensors, values = load(path)
        if path != self.files.last:
            log.warning("%s is damaged: going back to the checkpoint before it", self.files.last)
        if "best" in values:
            self._best, self._best_values = part(tensors, "best."), values["best"]
        elif self.files.best.is_file():  # of an older version, which has them in their file alone
            self._best, self._best_values = load(self.files.best)

        def bring_files_to_its_moment() -> None:
            if path != self.files.last:  # the damaged one must not become the previous one
                save(self.files.last, tensors, values)
            if self._best:
                save(self.files.best, self._best, self._best_values)

        processes.first(bring_files_to_its_moment)
        return tensors, values
