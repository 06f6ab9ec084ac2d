"""Experiment tracking: a run as Weights & Biases shows it, or nothing at all.

W&B is a view of a run; the record is in the run's folder. So no account, no network and no W&B
server never stops or slows a run: what goes wrong here is one warning line. wandb is
imported inside functions only, and nowhere else in the package.
"""

import logging
import os
import secrets
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mogrifier_lm.errors import UserError
from mogrifier_lm.tracking.offline import records

log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")
INIT_TIMEOUT = 8.0
"""Seconds to wait for the server when a run starts (wandb's default: 90)."""
FINISH_TIMEOUT = 12.0
"""Seconds to wait for the last uploads when a run ends (wandb's default: for ever)."""
SLOWEST_UPLOAD = 1e6
"""Bytes per second below which an artifact is not waited for."""
AXES = ("row", "step", "epoch", "tokens", "seconds")
"""In every row of a training run, to be chosen as x; W&B draws no panels of their own."""
DEFAULT_AXIS = {"train/*": "tokens", "valid/*": "epoch"}
FACTS = ("rounds", "hidden_size", "params")
"""Beside the final perplexities in a run's last row, for charts of a sweep."""


class Tracker:
    """Where a run's metrics are shown. As a context manager it is closed whatever happens.

    Args:
        run: a started W&B run; None for a tracker that does nothing.
        known_rows: that W&B has of an earlier part of the run; as many are not sent again.

    Attributes:
        run_id: W&B's id of the run, to be kept for its later parts; None where there is none.
    """

    def __init__(self, run: Any = None, known_rows: int = 0) -> None:
        self._run = run
        self._warned = False
        self._rows, self._known_rows = 0, known_rows
        self.run_id: str | None = None if run is None else run.id

    def log(self, metrics: Mapping[str, float]) -> bool:
        """Show the next row of the run's log of metrics, its number as "row"; whether it is new.

        wandb's own `step=` is not used: it drops what comes at a step that it has seen, and a
        step can have two rows.
        """
        self._rows += 1
        is_new = self._rows > self._known_rows
        if is_new:
            self._log({**metrics, "row": self._rows})
        return is_new

    def log_image(self, key: str, path: Path) -> None:
        """Show an image file (png, jpg), if there is one."""
        if self._run is not None and path.is_file():
            import wandb

            self._log({key: wandb.Image(str(path))})

    def log_table(self, key: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Show rows that have the same keys; None is an empty cell."""
        if self._run is not None:
            import wandb

            cells = [list(row.values()) for row in rows]
            self._log({key: wandb.Table(list(rows[0]), cells, allow_mixed_types=True)})

    def log_lines(
        self, key: str, lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x: str
    ) -> None:
        """Show a chart: label of a line → its points (x, y); `x` names the axis."""
        if self._run is not None:
            import wandb

            xs, ys = ([[point[i] for point in line] for line in lines.values()] for i in (0, 1))
            chart = wandb.plot.line_series(xs, ys, keys=list(lines), title=title, xname=x)
            self._log({key: chart})

    def log_model(self, folder: Path, files: Sequence[Path], metadata: Mapping[str, Any]) -> None:
        """Upload files of a run as an artifact of type "model".

        Their names are those in its folder, so that `load_model` reads what is downloaded. It
        waits for the upload, as long as it takes at SLOWEST_UPLOAD; where the server was lost,
        wandb takes 20 s to say so and the files are not uploaded by a later `wandb sync` either.
        """
        if self._run is None:
            return
        import wandb

        try:
            artifact = wandb.Artifact(
                f"model-{self.run_id}", type="model", metadata=dict(_flatten(metadata))
            )
            for file in files:
                artifact.add_file(str(folder / file), name=file.as_posix())
            logged = self._run.log_artifact(artifact, aliases=["best"])
            if not self._run.offline:
                logged.wait(timeout=int(FINISH_TIMEOUT + artifact.size / SLOWEST_UPLOAD))
        except Exception as error:
            log.warning("W&B has not got the checkpoint of %s: %s", folder, _one_line(error))

    def summary(self, values: Mapping[str, object]) -> None:
        """Set the run's final values; nested ones under joined keys such as "valid/static/ppl".

        Perplexities and FACTS are a row too: a line chart of W&B, such as perplexity against
        rounds over the runs of a sweep, takes nothing else.
        """
        flat = dict(_flatten(values))
        if self._run is not None:
            self._guarded(lambda: self._run.summary.update(flat))
        if row := {k: v for k, v in flat.items() if k in FACTS or k.endswith("/ppl")}:
            self._log(row)

    def _log(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            self._guarded(lambda: self._run.log(row))

    def close(self, exit_code: int = 0) -> None:
        """End the run: within FINISH_TIMEOUT seconds and without an error; twice does nothing.

        Args:
            exit_code: 0 marks the W&B run finished, anything else failed.
        """
        run, self._run = self._run, None
        if run is None:
            return
        folder = Path(run.settings.sync_dir)
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            log.warning(
                "W&B has not got all of this run (%s); upload it with: "
                "wandb sync --include-online %s",  # without the option it skips the folder
                _one_line(error), folder,
            )  # fmt: skip

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)

    def _guarded(self, call: Any) -> None:
        try:
            call()
        except Exception as error:
            if not self._warned:
                log.warning("W&B misses metrics of this run: %s", _one_line(error))
            self._warned = True


def build_tracker(
    *,
    kind: str,
    mode: str,
    project: str,
    entity: str | None,
    folder: Path,
    config: Mapping[str, Any],
    group: str | None,
    name: str,
    tags: Sequence[str],
    job_type: str = "train",
    run_id: str | None = None,
    rows: Iterable[Mapping[str, Any]] = (),
) -> Tracker:
    """Start tracking a run.

    Args:
        kind: "wandb" or "none".
        mode: "online", "offline", "disabled" or "auto": what WANDB_MODE says where it is set, else
            online where an API key is configured (WANDB_API_KEY, ~/.netrc), else offline. Online
            without a reachable server becomes offline, with a warning, after INIT_TIMEOUT seconds.
        folder: W&B's files go to its subfolder `wandb`.
        config: shown with the run; plain values, nested dictionaries allowed.
        group: runs of one sweep share it.
        job_type: "train", or "report" for the summary of a sweep.
        run_id: of an earlier part of the same run, which is then gone on with.
        rows: that the earlier parts have logged: what W&B lacks of them is sent first (a process
            that was killed may not have sent its last), and what it has is not sent again when
            training does it again.

    Raises:
        UserError: an unknown kind or mode; mode "online" without an API key; mode "online" or
            "offline" without wandb installed; a project, entity or name that wandb refuses.
    """
    if kind not in ("wandb", "none"):
        raise UserError(f"tracker {kind!r} is unknown: wandb or none")
    wish = _wish(mode)
    if kind == "none" or wish == "disabled" or not _can_import(mode, folder):
        return Tracker()
    import wandb

    # A job of a multirun that left its run open: wandb would join this one to it, and login() says
    # False as long as there is an open run.
    Tracker(wandb.run).close()
    if wandb.run is not None:  # its service was killed, and would take this run with it
        _new_session()
    _setup()
    if wish != "offline" and not _has_key():
        if wish == "online":
            raise UserError(
                "tracking online needs a W&B API key: run `wandb login`, set WANDB_API_KEY, "
                "or set tracker.mode=offline"
            )
        wish = "offline"
    folder.mkdir(parents=True, exist_ok=True)
    # One id for both attempts: what a failed online start leaves belongs to the same run then.
    # WANDB_RUN_ID is asked under W&B's own sweeps alone, whose agent starts a process per run: all
    # jobs of a multirun would be one run.
    given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    settings = {
        "project": project,
        "entity": entity,
        "dir": str(folder),
        "id": run_id or given or secrets.token_hex(5),
        "group": group,
        "name": name,
        "tags": list(tags),
        "job_type": job_type,
        "config": dict(config),
    }
    for attempt in ("offline",) if wish == "offline" else ("online", "offline"):
        run = _started(attempt, settings)
        if run is not None:
            return _caught_up(run, folder, rows)
    return Tracker()


def _wish(mode: str) -> str:
    """The mode that is asked for, by `mode` or by WANDB_MODE.

    Raises:
        UserError: it is unknown.
    """
    if mode not in MODES:
        raise UserError(f"tracker.mode={mode} is unknown: one of {', '.join(MODES)}")
    wish = os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode
    wish = {"dryrun": "offline", "run": "online", "": "auto"}.get(wish, wish)  # wandb's old names
    if wish not in MODES:
        raise UserError(f"WANDB_MODE={wish} is unknown here: online, offline or disabled")
    return wish


def _can_import(mode: str, folder: Path) -> bool:
    """Whether wandb is installed; one line says if not.

    Raises:
        UserError: it is not, and `mode` cannot do without.
    """
    # Without this wandb sends telemetry to its server, and where that does not answer the process
    # takes 20 s longer to exit.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb  # noqa: F401
    except ImportError:
        if mode != "auto":
            raise UserError(
                f"tracker.mode={mode} needs wandb, which is not installed: "
                "pip install wandb, or set tracker=none"
            ) from None
        log.warning(
            "wandb is not installed: the run is not tracked by W&B; its files in %s are complete",
            folder,
        )
        return False
    return True


def _started(mode: str, settings: Mapping[str, Any]) -> Any:
    """A W&B run, online or offline; None, with a warning, where wandb cannot start one.

    Raises:
        UserError: wandb refuses a name.
    """
    import wandb

    try:
        run = wandb.init(
            **settings,
            mode=mode,  # type: ignore[arg-type]
            resume="allow",
            reinit="finish_previous",
            settings=wandb.Settings(
                silent=True,
                console="off",  # capturing stdout gets in the way of loggers and progress lines
                init_timeout=INIT_TIMEOUT,
                finish_timeout=FINISH_TIMEOUT,
                finish_timeout_raises=True,
            ),
        )
        for axis in (*AXES, *FACTS):
            run.define_metric(axis, hidden=True)
        for metrics, axis in DEFAULT_AXIS.items():
            run.define_metric(metrics, step_metric=axis)
        if (
            "WANDB_SWEEP_ID" not in os.environ
        ):  # W&B's own sweeps read a number there, not {"min": }
            run.define_metric("valid/ppl", step_metric="epoch", summary="min")
    except (ValueError, wandb.errors.UsageError) as error:
        raise UserError(f"wandb refuses the run: {_one_line(error)}") from error
    except Exception as error:
        log.warning(
            "W&B cannot start %s (%s); %s", mode, _one_line(error),
            "going on offline (WANDB_MODE=offline skips the attempt)"
            if mode == "online" else f"the files in {settings['dir']} are complete without it",
        )  # fmt: skip
        # wandb's service goes on holding the id of a run that failed to start.
        _new_session()
        return None
    where = run.url if mode == "online" else f"wandb sync {run.settings.sync_dir}"
    log.info("W&B run %s, %s: %s", run.id, mode, where)
    return run


def _caught_up(run: Any, folder: Path, rows: Iterable[Mapping[str, Any]]) -> Tracker:
    """The tracker of a run that has started; what there is of it already is in W&B then."""
    rows = list(rows)
    try:
        # Offline wandb knows nothing of the earlier parts; it joins them when they are synced.
        last = _last_row(run, folder) if run.offline else run.summary.get("row", run.step)
    except Exception as error:
        log.warning("what W&B has of this run is not known (%s): taken to be all", _one_line(error))
        last = len(rows)
    tracker = Tracker(run, known_rows=last)
    for row in rows:
        tracker.log(row)
    return tracker


def _last_row(run: Any, above: Path) -> int:
    """The number of the last row in the files that earlier parts of a run have left."""
    own, last = Path(run.settings.sync_dir), 0
    for folder in above.glob(f"wandb/*run-*-{run.id}*"):
        if folder.resolve() != own.resolve():
            rows = [r["history"]["item"] for r in records(folder) if r["type"] == "history"]
            last = max([last, *(row["row"] for row in rows if "row" in row)])
    return last


def _setup() -> None:
    """Prepare wandb for login() and init()."""
    import wandb

    # Unless silent, login() waits 5 s for a dead server to say who is logged in; unless online, as
    # under WANDB_MODE=offline, it finds no account at all. init() is told a mode of its own.
    wandb.setup(wandb.Settings(silent=True, mode="online"))


def _new_session() -> None:
    """Leave wandb's service process, dead or alive, for a new one."""
    import wandb

    try:
        wandb.teardown()
    except Exception as error:
        log.debug("the W&B service does not end: %s", _one_line(error))
    wandb.run = None  # still there where the service was dead; login() would say False
    _setup()


def _has_key() -> bool:
    """Whether wandb finds credentials for its server: environment, ~/.netrc, its settings files."""
    import wandb

    try:
        return wandb.login(prompt=False, verify=False)
    except Exception as error:  # a key of the wrong form, say
        log.warning("W&B credentials cannot be used: %s", _one_line(error))
        return False


def _flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _one_line(error: Exception) -> str:
    """All of it: the first line of pydantic's errors says only how many there are."""
    return textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
