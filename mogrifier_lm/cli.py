"""Command lines: compose the config, check it, run it, and say what is wrong in one line.

Imports here are light: torch, datasets and wandb come in when a run needs them.
"""

import functools
import inspect
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mogrifier_lm import parallel
from mogrifier_lm.config import (
    SCHEMAS,
    Config,
    load_config,
    nearest,
    resume_config,
    save_config,
    unknown_key,
    validate,
    without_effect,
)
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import locked, write_json
from mogrifier_lm.reports.table import objective

log = logging.getLogger(__name__)

# Errors that the user can mend; OSError is a file or folder that cannot be read or written.
EXPECTED = (UserError, HydraException, OmegaConfBaseException, OSError)

# Beside the package in a checkout, inside it in a wheel.
_HERE = Path(__file__).resolve().parent
CONFIG_DIR = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"


@functools.cache
def run_dir(resume: str | None) -> str:
    """The folder of a run: that of the run to resume, else a new one named by date and time."""
    return parallel.first(lambda: _claim(resume))


def _claim(resume: str | None) -> str:
    """The folder of `run_dir`.

    A folder is claimed by making it, so that two runs that start in one second do not share it.
    """
    if resume:
        if not (Path(resume) / "config.yaml").is_file():
            raise UserError(f"resume={resume}: no config.yaml there, so it is not a run's folder")
        return resume
    base = Path("runs", time.strftime("%Y-%m-%d"), time.strftime("%H-%M-%S"))
    candidate, n = base, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return str(candidate)
        except FileExistsError:
            n += 1
            candidate = base.with_name(f"{base.name}_{n}")
        except OSError as error:
            raise UserError(f"{candidate} cannot be made: {error.strerror}") from error


def as_values(overrides: Sequence[str]) -> dict[str, str]:
    """key → value of overrides such as model.rounds=2."""
    return dict(override.partition("=")[::2] for override in overrides)


def job_dir(sweep_dir: str, num: int, overrides: Sequence[str]) -> str:
    """The folder, inside its sweep's, of the job with these overrides.

    It is the one that an earlier part of the sweep has begun with them, so that the same command,
    or one with more values, goes on with what is there; else `num`, or the next number free.
    """
    wanted = as_values(overrides)
    for path in Path(sweep_dir).glob("*/overrides.json"):
        if json.loads(path.read_text()) == wanted:
            return path.parent.name
    while True:
        try:
            Path(sweep_dir, str(num)).mkdir(parents=True)
            return str(num)
        except FileExistsError:
            num += 1


def config_groups() -> str:
    """What --help lists; not configs/wandb, whose files are for `wandb sweep`, nor Hydra's own."""
    options: dict[str, list[str]] = {}
    for path in sorted(CONFIG_DIR.glob("*/**/*.yaml")):
        group = path.parent.relative_to(CONFIG_DIR)
        if group.parts[0] not in ("wandb", "hydra"):
            options.setdefault(group.as_posix(), []).append(path.stem)
    return "\n".join(f"{group}: {', '.join(options[group])}" for group in sorted(options))


def register() -> None:
    """Tell Hydra the schema, how the folder of a run is named, and what --help lists."""
    ConfigStore.instance().store("schema", node=Config)
    # Cached, the folder of a sweep is that of the first process in those of a launcher, too.
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("job_dir", job_dir, replace=True)
    OmegaConf.register_new_resolver("config_groups", config_groups, replace=True)


register()  # on import, as a launcher's processes have nothing of ours but `_train`


def explain(error: BaseException) -> str:
    """One line for an error that the user can mend: the first cause that says something."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for cause in chain:
        if isinstance(cause, UserError):
            return str(cause)
    text = "\n".join(str(cause) for cause in chain)
    if "Could not override 'wandb'" in text:
        return "wandb is no group: tracker=wandb, or `wandb sweep configs/wandb/NAME.yaml`"
    path = re.search(r"full_key: (\S+)", text)
    unknown = re.search(r"Key '([^']+)' not in '(\w+)'", text)
    if unknown and unknown[2] in SCHEMAS:
        return str(unknown_key(path[1] if path else unknown[1], SCHEMAS[unknown[2]]))
    scalar = re.search(r"Error merging override (\S+)=(\S+)", text)
    if scalar and "is not a ListConfig" in text:
        return f"{scalar[1]} takes a list: {scalar[1]}=[{scalar[2]}]"
    value = re.search(r"Value '.*", text)
    if value and path:
        return f"{path[1]}: {value[0]}"
    wanted = re.search(
        r"Could not find '([\w/]+)/([^'/]*)'\s+Available options in '[\w/]+':\s+", text
    )
    if wanted:
        group, rest = wanted[1], text[wanted.end() :]
        options = re.findall(r"^\s*(\S+)$", rest.split("Config search path")[0], re.MULTILINE)
        return f"no {group}={wanted[2]}; {nearest(wanted[2], options)}"
    plugin = re.search(r"Could not load 'hydra/launcher/([a-z]+)", text)
    if plugin:
        return f"a launcher is not installed: pip install hydra-{plugin[1]}-launcher"
    missing = re.search(r"Could not load '(\w+)/([^']*)'", text)  # in a list of options
    if missing:
        options = sorted(path.stem for path in (CONFIG_DIR / missing[1]).glob("*.yaml"))
        return f"no {missing[1]}={missing[2]}; {nearest(missing[2], options)}"
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def of_launcher(error: Exception) -> str:
    """One line for an error of joblib or submitit: a process or job that died or was refused."""
    lines = str(error).splitlines()
    died = re.match(r"Job (\S+) .*with path (.*)_result\.pkl", lines[0])
    if died:
        return (
            f"job {died[1]} {lines[1]}: its log is {died[2]}_log.out; the other jobs go on, and "
            "the same command with hydra.sweep.dir=DIR goes on with what is left"
        )
    if lines[0].startswith("A worker process"):
        return (
            "a process of the sweep was killed (too little memory?) and the others ended with it; "
            "the same command with hydra.sweep.dir=DIR goes on with what is left"
        )
    if lines[0].endswith("with trace:"):
        return f"a job failed before its run began: {lines[-1]}"
    return "; ".join(lines[:2])


def guarded(main: Callable[[], Any], after_interrupt: str = "") -> None:
    """Run an entry point; the user's errors become one line and exit code 1."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on and leaves the words to us
    debug = "debug=true" in (argument.lower() for argument in sys.argv)
    try:
        main()
    except EXPECTED as error:
        if debug:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, NameError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        plugins = ("/joblib/", "/submitit/")
        if debug or not any(name in frame.filename for frame in frames for name in plugins):
            raise
        print(f"error: {of_launcher(error)}", file=sys.stderr)
        sys.exit(1)
    except AssertionError as error:  # OmegaConf's, for a key of a group that is null
        if "Unexpected type for root" not in str(error):
            raise
        keys = [a.partition("=")[0] for a in sys.argv[1:] if "." in a.partition("=")[0]]
        print(
            f"error: one of {', '.join(keys)} is a key of a group that is not there: an evaluator "
            "has to be named beside it, evaluators=[NAME]",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted{after_interrupt}", file=sys.stderr)
        sys.exit(130)


def train() -> None:
    """The command `python train.py`."""
    if parallel.RANK:  # the first process speaks for all
        logging.disable(logging.CRITICAL)
        os.environ["TQDM_DISABLE"] = "1"
    guarded(
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(_train),
        "; resume=RUN_DIR goes on from the last checkpoint, hydra.sweep.dir=DIR with a sweep",
    )


def _train(node: DictConfig) -> float:
    """One run, alone or in a multirun."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    overrides = list(hydra_config.overrides.task)
    if hydra_config.mode is None or hydra_config.mode.name != "MULTIRUN":
        if parallel.RANK:
            return _follow(node, folder, overrides)
        with locked(folder):
            return _run(node, folder, overrides)
    if parallel.SIZE > 1:
        raise UserError("torchrun is for one run; a sweep is started without it")
    if "basic" not in hydra_config.launcher._target_:
        _among_others(hydra_config.job.num)
    try:
        with locked(folder):
            return _run(node, folder, overrides, sweep=folder.parent.name)
    except Exception as error:
        reason = explain(error) or type(error).__name__
    finally:
        _report(folder.parent)
    # A new error: Hydra keeps it to the end of the sweep, and the old one's frames hold the model.
    raise UserError(f"{_shown(folder)}: {reason}")


def _among_others(num: int) -> None:
    """Lines of runs that share a terminal begin with the run's number; there are no bars."""
    os.environ["TQDM_DISABLE"] = "1"
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(logging.Formatter(f"[{num}] %(message)s"))


def _follow(node: DictConfig, folder: Path, overrides: Sequence[str]) -> float:
    """The part in a run of a process that torchrun started beside the first."""
    config = resume_config(node, folder, overrides) if node.resume else validate(node)
    from mogrifier_lm.run import run

    return run(config, folder, overrides, None)


def _run(
    node: DictConfig, folder: Path, overrides: Sequence[str], sweep: str | None = None
) -> float:
    """Run a config in its folder, or what is left of it there; a failure leaves its reason."""
    holds_run, begun = (folder / "checkpoints").exists(), False
    try:
        if sweep and node.resume:
            raise UserError(
                f"resume={node.resume} goes on with one run; a sweep goes on by its own command "
                "with hydra.sweep.dir=DIR"
            )
        if holds_run and not (node.resume or sweep):
            raise UserError(
                f"{folder} holds a run already: resume={folder}, or take another folder"
            )
        if not (holds_run or node.resume):
            write_json(folder / "overrides.json", as_values(overrides))
        config = resume_config(node, folder, overrides) if node.resume else validate(node)
        if sweep and (folder / "config.yaml").is_file():
            path = folder / "summary.json"
            summary = json.loads(path.read_text()) if path.is_file() else {}
            if load_config(folder) != config:
                raise UserError(
                    f"{_shown(folder)} holds a run of these overrides with another config.yaml: "
                    "take another hydra.sweep.dir"
                )
            if summary.get("status") == "completed":
                log.info("%s is completed: skipped", _shown(folder))
                return objective(summary)
        for key in without_effect(config, overrides):
            log.warning("%s has no effect beside the other settings", key)
        # Written before torch is imported: from here on a run that is killed can be resumed.
        save_config(config, folder)
        (folder / "summary.json").unlink(missing_ok=True)  # of the part that failed
        begun = True
        from mogrifier_lm.run import run

        return run(config, folder, overrides, sweep)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        status = "interrupted" if interrupted else "failed"
        reason = explain(error) or type(error).__name__
        if isinstance(error, SystemExit):  # raised by submitit, when SLURM sends its signal
            reason = "at its time limit or preempted; it goes on when the queue starts it again"
        if begun or not holds_run:  # a command that is refused leaves the run that is there alone
            failure = {"status": status, "error": reason, "seed": node.seed}
            write_json(folder / "summary.json", failure)
        log.error("run %s: %s", status, reason)
        with open(folder / "train.log", "a") as file:
            traceback.print_exc(file=file)
        raise


# What may be given beside the run itself, which is scored as it was trained.
SCORABLE = (
    "debug=",
    "evaluators",
    "data.dir=",
    "data.cache_dir=",
    "trainer.device=",
    "trainer.threads=",
)


def evaluate() -> None:
    """The command `python scripts/evaluate.py`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    guarded(_evaluate)


def _evaluate() -> None:
    own = [a for a in sys.argv[1:] if a.startswith(("run=", "compare="))]
    overrides = [a for a in sys.argv[1:] if a not in own]
    if len(own) != 1:
        raise UserError("give either run=RUN_DIR or compare=[RUN_A,RUN_B]")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        node = hydra.compose("config", overrides=overrides)

    def load(folder: Any) -> tuple[Config, Path]:
        return resume_config(node, Path(str(folder)), overrides, SCORABLE), Path(str(folder))

    if own[0].startswith("run="):
        config, folder = load(own[0].removeprefix("run="))
        from mogrifier_lm.evaluate import evaluate_run

        evaluate_run(config, folder)
        return
    sides = OmegaConf.to_container(OmegaConf.from_dotlist(own))["compare"]  # type: ignore[index, call-overload]
    if not isinstance(sides, list) or len(sides) != 2:
        raise UserError(f"{own[0]}: compare=[RUN_A,RUN_B] takes two runs, or two lists of runs")
    runs = [[load(f) for f in (side if isinstance(side, list) else [side])] for side in sides]
    from mogrifier_lm.evaluate import compare_runs

    compare_runs(runs)


def script(main: Callable[..., None], after_interrupt: str = "") -> None:
    """Call `main` with the KEY=VALUE arguments of the command line.

    The keys, their types and defaults are those of its parameters; *overrides among them take the
    arguments of other keys as they are. Its module's docstring is what --help shows.
    """
    arguments = [a for a in sys.argv[1:] if a.lower() != "debug=true"]
    guarded(lambda: _call(main, arguments), after_interrupt)


def _call(main: Callable[..., None], arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        return print(main.__globals__["__doc__"])
    parameters = dict(inspect.signature(main).parameters)
    passes, rest = parameters.pop("overrides", None), []
    values = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument} is not KEY=VALUE; --help shows the keys")
        if key not in parameters and passes:
            rest.append(argument)
            continue
        if key not in parameters:
            raise UserError(f"unknown key {key}; {nearest(key, list(parameters))}")
        kind = parameters[key].annotation
        try:
            values[key] = kind(value)
        except ValueError as error:
            raise UserError(f"{argument}: the value must be of type {kind.__name__}") from error
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in values:
            raise UserError(f"give {key}=…; --help shows the keys")
    main(*rest, **values)


def _shown(folder: Path) -> Path:
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def grid(sweep_dir: Path) -> list[dict[str, str]]:
    """The overrides of every run that the command of a sweep asks for; [] if a search decides."""
    sweep = OmegaConf.load(sweep_dir / "multirun.yaml").hydra
    params = [f"{key}={value}" for key, value in (sweep.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    try:
        parsed = parser.parse_overrides([*params, *sweep.overrides.task])
        return [as_values(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]
    except HydraException:
        return []


def _report(sweep_dir: Path) -> None:
    """Write the report of a sweep as far as it is, and say how far that is."""
    try:
        from mogrifier_lm.reports.sweep import ended, progress, read_runs, write_report

        with locked(sweep_dir / "report", wait=True):
            runs, jobs = read_runs([sweep_dir]), grid(sweep_dir)
            write_report(runs, sweep_dir / "report")
            began = (sweep_dir / "multirun.yaml").stat().st_mtime
            path = _shown(sweep_dir) / "report" / "sweep.md"
            log.info("%s: %s", path, progress(runs, jobs, began))
            if ended(runs, jobs, began):
                from mogrifier_lm.reports.sweep_run import track_sweep

                track_sweep(runs, sweep_dir)
    except Exception:  # the runs are worth more than their report
        log.warning("the report of %s is not written", sweep_dir, exc_info=True)
