"""Checkpoints: each one moment, verified, and kept until the next is whole."""

import json
import logging
import math
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import safetensors.torch
import torch

from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators.score import Score
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.training import checkpoint
from mogrifier_lm.training.trainer import Trainer
from tests.training.test_trainer import lines, trainer_of, weights

TENSORS = {
    "a": torch.arange(6.0).view(2, 3).T,
    "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "count": torch.tensor(7.0, dtype=torch.float64),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "true": torch.tensor([True, False]),
}
VALUES = {
    "step": 3,
    "ppl": 1.5,
    "best": math.inf,
    "large": 2**62,
    "text": 'a "crc32": "00000000" é',
}


def test_what_is_saved_is_loaded_and_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.safetensors"
    checkpoint.save(path, TENSORS, VALUES)
    assert os.listdir(path.parent) == [path.name]
    tensors, values = checkpoint.load(path)
    assert values == VALUES
    for found in (tensors, safetensors.torch.load_file(path)):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, TENSORS, VALUES)
    whole = path.read_bytes()
    name = whole.index(b'"crc32"')  # where it is hit the file is taken for an older one, and whole
    for position in (i for i in range(len(whole)) if not name <= i < name + len('"crc32"')):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.load(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.load(path)


def test_a_file_of_an_older_version_has_no_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.ones(2)}
    safetensors.torch.save_file(tensors, path, metadata={"values": json.dumps(VALUES)})
    assert checkpoint.load(path)[1] == VALUES


def test_a_damaged_checkpoint_is_gone_back_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    trainer_of(tmp_path, max_steps=9, valid_every=3).fit()
    expected = weights(resumed(tmp_path, max_steps=15))
    for file in (folder.last, folder.best):
        raw = bytearray(file.read_bytes())
        raw[-5] ^= 4
        file.write_bytes(raw)
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        checkpoint.load(folder.best)
    with caplog.at_level(logging.WARNING):
        trainer = resumed(tmp_path, max_steps=15)
    assert "state.safetensors is damaged: going back to the checkpoint before it" in caplog.text
    assert torch.equal(weights(trainer), expected)
    checkpoint.load(folder.best)
    checkpoint.load(folder.previous)
    for file in (folder.last, folder.previous):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="state.safetensors is damaged"):
        resumed(tmp_path)


def resumed(folder: Path, **options: Any) -> Any:
    trainer = trainer_of(folder, **options)
    trainer.load()
    trainer.fit()
    return trainer.model


class Killed(BaseException):
    pass


def diverging(folder: Path, ppl: Iterator[float]) -> Trainer:
    """Validations that get better until one is far worse: then the best weights are taken again."""
    return trainer_of(
        folder,
        {"name": "adam", "lr": 0.02},
        validate=lambda: Score(nats=math.log(next(ppl)), tokens=1, words=1, bytes=1),
        max_steps=8,
        valid_every=1,
        log_every=1,
        lr_on_divergence=0.5,
    )


PPL = [9.0, 5.0, 4.0, 3.0, 8.5, 3.5, 2.0, 7.0]


@pytest.mark.slow
def test_a_kill_at_any_event_of_a_checkpoint_leaves_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where training then goes back to the best weights, which must not be of its future."""
    whole = diverging(tmp_path / "whole", iter(PPL))
    (tmp_path / "whole").mkdir()
    whole.fit()
    kills = 0

    def dying(call: Callable[..., Any], at: int) -> Callable[..., Any]:
        left = iter(range(at, -1, -1))

        def die(*arguments: Any, **options: Any) -> Any:
            if next(left, None) == 0:
                raise Killed
            return call(*arguments, **options)

        return die

    for event in ("replace", "fsync", "link"):
        for at in range(0, 40, 3):
            folder = tmp_path / f"{event}{at}"
            folder.mkdir()
            with monkeypatch.context() as patch:
                patch.setattr(os, event, dying(getattr(os, event), at))
                try:
                    diverging(folder, iter(PPL)).fit()
                except Killed:
                    kills += 1
            trainer = diverging(folder, iter([]))
            if RunFolder(folder).last.is_file():
                trainer.load()
                done = [line for line in lines(folder) if "valid/ppl" in line]
                assert len(done) == trainer.progress.step
                trainer.validate = diverging(folder, iter(PPL[len(done) :])).validate
            else:
                RunFolder(folder).metrics.unlink(missing_ok=True)
                trainer.validate = diverging(folder, iter(PPL)).validate
            trainer.fit()
            assert torch.equal(weights(trainer.model), weights(whole.model)), (event, at)
            assert len(lines(folder)) == len(lines(tmp_path / "whole"))
    assert kills > 20


def kept(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """File → tensors of what is kept beside the best and the last."""
    files = folder.glob("checkpoints/*/step-*")
    return {f"{file.parent.name}/{file.name}": checkpoint.load(file)[0] for file in files}


@pytest.mark.parametrize("kill", ["before", "after"])
def test_the_last_and_the_best_few_are_kept_as_if_never_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: str
) -> None:
    """Killed between a validation and its checkpoint, and between that and what follows it."""

    def trainer(name: str, ppl: Sequence[float]) -> Trainer:
        (tmp_path / name).mkdir(exist_ok=True)
        scores = iter(ppl)
        score = lambda: Score(nats=math.log(next(scores)), tokens=1, words=1, bytes=1)  # noqa: E731
        return trainer_of(
            tmp_path / name, validate=score, max_steps=8, valid_every=1, keep_last=2, keep_best=3
        )

    ppl = [9.0, 5.0, math.inf, 3.0, 8.5, 3.5, 3.0, 7.0]
    trainer("whole", ppl).fit()
    whole = kept(tmp_path / "whole")
    assert whole.keys() == {
        "last/step-7.safetensors", "last/step-8.safetensors", "best/step-4.safetensors",
        "best/step-6.safetensors", "best/step-7.safetensors",
    }  # fmt: skip
    best = checkpoint.load(RunFolder(tmp_path / "whole").best)[0]
    assert all(torch.equal(best[k], v) for k, v in whole["best/step-4.safetensors"].items())
    for step in range(2, 8):
        name = str(step)
        cut = trainer(name, ppl)
        method = "save" if kill == "before" else "settle"
        call = getattr(cut.checkpoints, method)

        def dying(*a: Any, call: Any = call, step: int = step) -> None:
            if (a[1]["progress"]["step"] if len(a) > 1 else a[0]) == step:
                raise Killed
            call(*a)

        monkeypatch.setattr(cut.checkpoints, method, dying)
        with pytest.raises(Killed):
            cut.fit()
        again = trainer(name, ppl[step - (kill == "before") :])
        again.load()
        again.fit()
        found = kept(tmp_path / name)
        assert found.keys() == whole.keys(), step
        for file, tensors in whole.items():
            assert tensors.keys() == found[file].keys()
            assert all(torch.equal(tensors[k], found[file][k]) for k in tensors), (step, file)
    # One that is kept can be gone back to: what came later goes.
    folder = RunFolder(tmp_path / "whole")
    shutil.copyfile(folder.last.with_name("step-7.safetensors"), folder.last)
    back = trainer("whole", ppl[7:])
    back.load()
    assert back.progress.step == 7 and len(kept(tmp_path / "whole")) == 4
    back.fit()
    assert kept(tmp_path / "whole").keys() == whole.keys()


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the moment at which it was asked for; the end waits for it."""
    places = [RunFolder(tmp_path / name) for name in ("whole", "late")]
    for place in places:
        place.path.mkdir()
    adam = {"name": "adam", "lr": 0.01}
    trainer_of(places[0].path, adam, max_steps=3).fit()
    goes_on, write = Event(), checkpoint.save

    def late(*arguments: Any) -> None:
        assert goes_on.wait(60), "training waits for the disk"
        write(*arguments)

    monkeypatch.setattr(checkpoint, "save", late)
    trainer = trainer_of(places[1].path, adam, max_steps=5, valid_every=3, log_every=1)
    trainer.fit(lambda line: goes_on.set() if line["step"] == 5 else None)
    of_3, late_of_3 = checkpoint.load(places[0].last), checkpoint.load(places[1].previous)
    assert late_of_3[1]["progress"]["step"] == 3
    assert of_3[0].keys() == late_of_3[0].keys()
    assert all(torch.equal(tensor, late_of_3[0][name]) for name, tensor in of_3[0].items())
    assert checkpoint.load(places[1].last)[1]["progress"]["step"] == 5


@pytest.mark.parametrize("step", [3, 8])
def test_a_checkpoint_that_cannot_be_written_ends_training(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next step after it is known; at the end where there is none."""
    trainer = trainer_of(tmp_path, max_steps=8, valid_every=3)
    update = trainer.step

    def full(*_: Any) -> None:
        raise UserError(f"the disk is full after step {trainer.progress.step}")

    def a_step() -> None:
        wait([trainer.checkpoints._writing])
        if trainer.progress.step == step - 1:
            monkeypatch.setattr(checkpoint, "save", full)
        update()

    monkeypatch.setattr(trainer, "step", a_step)
    with pytest.raises(UserError, match="the disk is full"):
        trainer.fit()
    assert trainer.progress.step == min(step + 1, 8)


def test_a_log_that_is_shorter_than_was_counted_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_of(tmp_path, max_steps=6, log_every=1).fit()
    log = RunFolder(tmp_path).metrics
    log.write_bytes(log.read_bytes()[:400])
    with caplog.at_level(logging.WARNING):
        resumed(tmp_path, max_steps=8, log_every=1)
    assert "lacks lines of before the checkpoint" in caplog.text
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps[0] == 1 and steps[-1] == 8 and steps == sorted(steps)


def test_a_strangers_header_is_bounded_and_shapes_are_known_before_all_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files with holes in them: of many bytes, few of which are on the disk."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**33))
    os.truncate(path, 2**34)
    tracemalloc.start()
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(path)
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()
    size = 2**31
    header = {"w": {"dtype": "F32", "shape": [4, size // 16], "data_offsets": [0, size]}}
    text = json.dumps({"__metadata__": {"values": "{}", "crc32": "0"}} | header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)
    monkeypatch.setattr(checkpoint.zlib, "crc32", None)
    assert checkpoint.weight_shapes(path) == [[4, size // 16]]


def test_headers_say_where_a_tensor_lies(tmp_path: Path) -> None:
    """Wide types first, so that none begins at an odd place."""
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, TENSORS, {})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0, name
