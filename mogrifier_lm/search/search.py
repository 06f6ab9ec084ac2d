"""Hyperparameter search: Optuna proposes and prunes trials, each a run in a process of its own.

All that a search knows is on disk: its study in study.log, each trial's run in the folder of its
number. One process, which holds the folder's lock, asks the study for trials, starts them, reads
their validation perplexities out of metrics.jsonl, and ends those that are hopeless.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mogrifier_lm.errors import UserError
from mogrifier_lm.files import write_json
from mogrifier_lm.launch import cli
from mogrifier_lm.launch.overrides import as_values, quoted
from mogrifier_lm.launch.sweep_report import update_report
from mogrifier_lm.machine import lent_cores
from mogrifier_lm.reports.folders import STUDY, about
from mogrifier_lm.reports.table import objective
from mogrifier_lm.reports.trials import NAME, storage
from mogrifier_lm.runs.folder import RunFolder, Status, locked
from mogrifier_lm.search.ranges import as_override, check, read_space
from mogrifier_lm.tracking.names import sweep_name

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

POLL_SECONDS = 0.3
END_SECONDS = 60.0  # for a run that was told to end, W&B's files included
# Per cent of the completed trials: a run worse than so many at the same validation is given up.
# Those that complete are mostly good, and their median would cost runs of the better half.
WORSE_THAN = 75.0
HOPELESS = 5  # failures in this command with no trial completed in the study
FOREIGN = ("sweep=", "resume=", "hydra", "-", "~")
CHILD = "from mogrifier_lm.search.search import child; child()"


def child() -> None:
    """`python train.py`, interrupted when its standard input ends.

    The search closes it to end a run; where the search was killed the system does.
    """

    def watch() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(END_SECONDS)  # a search that was killed cannot see to it
        os.kill(os.getpid(), signal.SIGKILL)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=watch, daemon=True).start()
    cli.train()


class TrialRun:
    """A trial, and the process that runs it in its folder or goes on with what is there.

    Args:
        trial: of the study, running.
        folder: of the run.
        overrides: of train.py, for a run that has to begin.
    """

    def __init__(self, trial: "optuna.Trial", folder: RunFolder, overrides: Sequence[str]) -> None:
        self.trial, self.folder = trial, folder
        self.reported = len(trial.study.trials[trial.number].intermediate_values)
        if folder.has_begun():
            print(f"{folder}: going on, once no other process works there", flush=True)
        with folder.locked(wait=True):
            pass  # once the process of a search that was killed has ended
        place = quoted(str(folder.path))
        arguments = (
            [f"resume={place}"] if folder.has_begun() else [*overrides, f"hydra.run.dir={place}"]
        )
        with open(folder.log, "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CHILD, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,  # train.log has it
                stderr=errors,
                start_new_session=True,  # Ctrl-C reaches the search alone
            )

    def stop(self) -> None:
        """Ask the run to end: it reads the end of its standard input as a signal."""
        assert self.process.stdin
        self.process.stdin.close()

    def wait(self) -> None:
        """Wait until the process has ended; one that does not within END_SECONDS is killed."""
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def hopeless(self) -> bool:
        """Report new validations to the study; whether its pruner gives the run up."""
        for point in [*self.folder.rows("valid/ppl")][self.reported :]:
            self.reported += 1
            self.trial.report(math.log(point["valid/ppl"]), self.reported)
            if self.trial.should_prune():
                return True
        return False

    def ended(self) -> bool:
        """Whether the run has, or has to: then its process is gone and the study told."""
        from optuna.trial import TrialState

        code = self.process.poll()  # before the metrics are read: with it they are complete
        prune = self.hopeless() and code is None
        if code is None and not prune:
            return False
        self.stop()
        self.wait()
        summary, tell = self.folder.read_summary(), self.trial.study.tell
        if summary.get("status") == Status.COMPLETED:
            tell(self.trial, math.log(objective(summary)))
        elif prune:
            points = list(self.folder.rows("valid/ppl"))
            best = min(point["valid/ppl"] for point in points)
            reason = f"validation perplexity {best:.2f} after {points[-1]['epoch']:.3g} epochs"
            summary |= {"status": Status.PRUNED, "error": reason, "best_ppl": best}
            write_json(self.folder.summary, summary)
            tell(self.trial, state=TrialState.PRUNED)
        else:
            if summary.get("status") != Status.FAILED:
                reason = f"its process ended with code {self.process.returncode}, see train.log"
                self.folder.end(Status.FAILED, reason)
            tell(self.trial, state=TrialState.FAIL)
        return True

    def outcome(self) -> str:
        """How the trial ended, in one line."""
        summary = self.folder.read_summary()
        value = f"{objective(summary):.2f}" if "valid" in summary else summary["error"]
        return f"trial {self.trial.number} {summary['status']}: {value}"


@dataclass(kw_only=True)
class Search:
    """What a search is asked for; scripts/search.py tells of each.

    Raises:
        UserError: a number, a space or an override that does not fit.
    """

    overrides: Sequence[str]
    dir: Path
    space: str
    trials: int
    jobs: int
    startup: int
    warmup: int
    sampler_seed: int

    def __post_init__(self) -> None:
        if min(self.trials, self.jobs, self.startup, self.warmup) < 1 or self.sampler_seed < 0:
            raise UserError("trials, jobs, startup, warmup must be at least 1, sampler_seed 0")
        if wrong := [override for override in self.overrides if override.startswith(FOREIGN)]:
            raise UserError(f"{wrong[0]}: the trials of a search are single runs, inside its dir")
        given = as_values(self.overrides)
        self.ranges = {k: r for k, r in read_space(self.space).items() if k not in given}
        self.settings = list(self.overrides)  # of every trial
        if "tracker.group" not in given:
            self.settings.append(f"tracker.group={quoted(sweep_name(self.dir))}")
        if self.jobs > 1 and "trainer.threads" not in given and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, lent_cores() // self.jobs)
            self.settings.append(f"trainer.threads={threads}")
        self.whole = check(self.ranges, self.settings)

    def run(self) -> None:
        """Begin the search, or go on with it, until its study has all its trials.

        Raises:
            UserError: Optuna is not installed; the folder is of another search, or of one that is
                at work; no trial completes.
        """
        for name in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(name) is signal.SIG_DFL:  # nohup's is not
                signal.signal(name, signal.default_int_handler)
        with locked(self.dir):
            study = self._study()
            import optuna

            # Nobody runs what the study takes for running: its search was cut.
            cut = study.get_trials(states=[optuna.trial.TrialState.RUNNING])
            at_work: list[TrialRun] = []
            began, fresh = time.monotonic(), 0
            print(f"{self.dir}: {self._progress(study)}", flush=True)
            try:
                while True:
                    while len(at_work) < self.jobs and (cut or len(study.trials) < self.trials):
                        trial, values = self._trial(study, cut.pop(0) if cut else None)
                        folder = RunFolder(self.dir / str(trial.number))
                        at_work.append(TrialRun(trial, folder, [*self.settings, *values]))
                    if not at_work:
                        break
                    time.sleep(POLL_SECONDS)
                    ended = [run for run in at_work if run.ended()]
                    fresh += len(ended)
                    for run in ended:
                        at_work.remove(run)
                        pace = (time.monotonic() - began) / fresh
                        print(f"{run.outcome()}; {self._progress(study, pace)}", flush=True)
                        update_report(self.dir)
                        if fresh >= HOPELESS and not _ended(study, "COMPLETE", "PRUNED"):
                            raise UserError(f"every trial fails; {run.outcome()}")
            finally:
                for run in at_work:
                    run.stop()
                for run in at_work:
                    run.wait()
            if not _ended(study, "COMPLETE"):
                raise UserError(f"{self.dir}: no trial has completed")
            update_report(self.dir, lambda runs: True)

    def _study(self) -> "optuna.Study":
        """The study of the folder, a new one where there is none.

        Raises:
            UserError: it was begun with another space or other settings, or the runs are a sweep's.
        """
        path = self.dir / STUDY
        if path.is_file():
            # A search that was killed may leave a part of a line, and Optuna's own lock.
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
            path.with_name(f"{STUDY}.lock").unlink(missing_ok=True)
        elif any(RunFolder(path).is_run() for path in self.dir.glob("*/")):
            raise UserError(f"{self.dir} holds runs that are not of a search: take another dir")
        stored = storage(path)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            study_name=NAME,
            storage=stored,
            pruner=optuna.pruners.PercentilePruner(WORSE_THAN, self.startup, self.warmup),
            load_if_exists=True,
        )
        asked = {
            "space": [f"{key} {r}" for key, r in self.ranges.items()],
            "overrides": sorted(self.overrides),
            "sampler_seed": [f"sampler_seed={self.sampler_seed}"],
        }
        begun = study.user_attrs.get("asked", asked)
        for key, now in asked.items():
            if difference := set(now) ^ set(begun[key]):
                there = [f"{'with' if x in begun[key] else 'without'} {x}" for x in difference]
                raise UserError(
                    f"{self.dir} is a search {', '.join(sorted(there))}: give the command it was "
                    "begun with, or another dir"
                )
        study.set_user_attr("asked", asked)
        return study

    def _trial(
        self, study: "optuna.Study", cut: "optuna.trial.FrozenTrial | None"
    ) -> "tuple[optuna.Trial, list[str]]":
        """The trial that was cut or a new one, and its overrides."""
        import numpy as np
        import optuna

        # A generator for each trial: a search that was cut draws what it would have drawn.
        number = cut.number if cut else len(study.trials)
        seed = np.random.SeedSequence([self.sampler_seed, number]).generate_state(1)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar was experimental
            study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=self.startup, constant_liar=True, seed=int(seed)
            )
        trial = optuna.Trial(study, cut._trial_id) if cut else study.ask()
        values = {k: r.suggest(trial, k, self.whole[k]) for k, r in self.ranges.items()}
        return trial, [as_override(key, value) for key, value in values.items()]

    def _progress(self, study: "optuna.Study", pace: float | None = None) -> str:
        """How far the search is; the time left at `pace` seconds a trial."""
        done, pruned, failed = (_ended(study, name) for name in ("COMPLETE", "PRUNED", "FAIL"))
        left = max(0, self.trials - done - pruned - failed)
        text = f"{done} completed, {pruned} pruned, {failed} failed, {left} left"
        if done:
            best = study.best_trial
            text = f"best {math.exp(study.best_value):.2f} (trial {best.number}), {text}"
        return f"{text}, {about(pace * left)}" if pace and left else text


def _ended(study: "optuna.Study", *states: str) -> int:
    """How many trials of the study ended in one of these states."""
    return sum(trial.state.name in states for trial in study.get_trials(deepcopy=False))
