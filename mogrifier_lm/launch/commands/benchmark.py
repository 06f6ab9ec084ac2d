"""Time the project's kernels against their peers and the machine's limit.

python scripts/benchmark.py                    # everything but the largest step
python scripts/benchmark.py what=recurrence shape=h650-r5 threads=1,2
python scripts/benchmark.py what=step,evaluate,memory json=out.json
python scripts/benchmark.py device=cuda what=recipes recipe=ptb_mogrifier_24m,ptb_lstm_24m

recurrence  forward and backward of one layer. "reference" is the loop over time under autograd as
            the community writes it, "compiled" is torch.compile of that loop, left out if it has
            not finished after compile_seconds
step        a whole training step of a language model, the trainer's own: two tied layers, loss,
            gradient, clipping at 0.25, SGD. The example is PyTorch's word_language_model with a
            plain LSTM; ours have rounds of mogrification
recipes     the same of whole recipes, with dropout, optimizer and averages (recipe=...), beside the
            example at as many parameters, and their evaluation; kernels=true counts a GPU's kernels
            and shares out their time. Not part of "everything"
evaluate    scoring at batch 1, two layers of 650, 5 rounds, V = 10,000, on random tokens; "ptb, s"
            is the time of PTB's test set, 82,430 tokens, at that rate
memory      how much a WikiText-2 step of the output layer (N 4,480, V 33,278, E 400) adds to the
            process's peak memory, beside the plain way's

The candidates of a table take turns in one process, after a first turn that is not timed; times
are medians. "x naive" is how many times faster than the reference (step: the example) in fp32,
"x limit" how many times longer than the operations take at the rate of a large product of the same
dtype, timed in the same turns. A candidate that disagrees with the reference is not timed; the
exit code is then 1. On a GPU all but the example and torch.compile's are captured as graphs, the
example also ("its graph"). seconds is for each table, tokens what evaluations score.
"""

import json as json_
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.cli import script
from mogrifier_lm.launch.provenance import cpu_model

PARTS = ("recurrence", "step", "recipes", "evaluate", "memory")


def main(
    *,
    what: list[str] = ["recurrence", "step", "evaluate", "memory"],  # noqa: B006
    shape: list[str] | None = None,
    recipe: list[str] | None = None,
    threads: list[int] | None = None,
    device: str = "cpu",
    seconds: float = 20,
    compile_seconds: int = 60,
    tokens: int = 1000,
    kernels: bool = False,
    json: Path | None = None,
) -> None:
    import torch

    from mogrifier_lm.launch.benchmarks import layers, models, timing

    names = [*layers.RECURRENCES, *models.STEPS]
    _check("what", what, PARTS)
    _check("shape", shape or (), names)
    _check("recipe", recipe or (), models.RECIPES)
    _check("device", [device], ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch finds no CUDA device here")
    jobs: dict[tuple[str, str], Callable[[], timing.Rows]] = {}
    for name in shape or names[:-1]:  # the last takes minutes on a CPU
        if name in layers.RECURRENCES:
            one = partial(layers.recurrence, layers.RECURRENCES[name], device, seconds)
            jobs["recurrence", name] = partial(one, compile_seconds)
        else:
            jobs["step", name] = partial(models.step, models.STEPS[name], device, seconds)
    for name in recipe or models.RECIPES:
        jobs["recipes", name] = partial(models.recipe, name, device, seconds, kernels)
        scoring = partial(models.recipe_scoring, name, tokens, device)
        jobs["recipes", f"{name}, scoring"] = scoring
    jobs["evaluate", f"{tokens} tokens"] = partial(models.evaluate, tokens, device, seconds)
    jobs["memory", "wikitext-2"] = partial(models.memory, device)
    header = {"torch": torch.__version__, "python": platform.python_version()}
    capability = torch.backends.cpu.get_cpu_capability()
    on_cpu = f"{cpu_model()} ({capability})"
    header["device"] = torch.cuda.get_device_name() if device == "cuda" else on_cpu
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    rows: timing.Rows = []
    for number in threads or [torch.get_num_threads()]:
        torch.set_num_threads(number)
        for (part, name), job in jobs.items():
            if part not in what:
                continue
            measured = job()
            print(f"\n{part} {name}, {number} threads\n{timing.table(measured)}", flush=True)
            place: dict[str, Any] = {"part": part, "shape": name, "threads": number}
            rows += [place | row for row in measured]
            if json:
                json.write_text(
                    json_.dumps(header | {"rows": rows}, indent=1) + "\n", encoding="utf-8"
                )
    if any(row.get("not timed") == timing.DISAGREES for row in rows):
        sys.exit(1)


def _check(key: str, given: Any, known: Any) -> None:
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"{key}={unknown[0]}: it must be one of {', '.join(known)}")


command = partial(script, main)
