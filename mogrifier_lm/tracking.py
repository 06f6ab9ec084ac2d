"""Experiment tracking: a run as Weights & Biases shows it, or nothing at all.

W&B is a view of a run; the record is metrics.jsonl and summary.json. So no account, no network and
no W&B server never stops or slows a run: what goes wrong here is one warning line. wandb is
imported inside functions only, and nowhere else in the package.
"""

import logging
import os
import secrets
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mogrifier_lm.errors import UserError

log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")
INIT_TIMEOUT = 8.0
"""Seconds to wait for the server when a run starts (wandb's default: 90)."""
FINISH_TIMEOUT = 12.0
"""Seconds to wait for the last uploads when a run ends (wandb's default: for ever)."""


class Tracker:
    """Where a run's metrics are shown. As a context manager it is closed whatever happens.

    Args:
        run: a started W&B run; None for a tracker that does nothing.
        run_id: kept by a tracker that does nothing, so that a run which is resumed without W&B
            once still finds its W&B run the next time.

    Attributes:
        run_id: W&B's id of the run, to be saved in checkpoints; None where there is none.
    """

    def __init__(self, run: Any = None, run_id: str | None = None) -> None:
        self._run = run
        self._warned = False
        self.run_id: str | None = run_id if run is None else run.id

    def log(self, metrics: Mapping[str, float]) -> None:
        """Show one row of metrics, with its "step", "epoch", "tokens", "seconds" as values.

        wandb's own `step=` is not used: it drops rows that a resumed run does again.
        """
        if self._run is not None:
            self._guarded(lambda: self._run.log(dict(metrics)))

    def log_image(self, key: str, path: Path) -> None:
        """Show an image file (png, jpg)."""
        if self._run is not None:
            import wandb

            self._guarded(lambda: self._run.log({key: wandb.Image(str(path))}))

    def summary(self, values: Mapping[str, object]) -> None:
        """Set the run's final values; nested ones under joined keys such as "valid/static/ppl"."""
        if self._run is not None:
            self._guarded(lambda: self._run.summary.update(dict(_flatten(values))))

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
    run_dir: Path,
    config: Mapping[str, Any],
    group: str | None,
    name: str,
    tags: Sequence[str],
    run_id: str | None = None,
) -> Tracker:
    """Start tracking a run.

    Args:
        kind: "wandb" or "none".
        mode: "online", "offline", "disabled" or "auto": what WANDB_MODE says where it is set, else
            online where an API key is configured (WANDB_API_KEY, ~/.netrc), else offline. Online
            without a reachable server becomes offline, with a warning, after INIT_TIMEOUT seconds.
        run_dir: W&B's files go to its subfolder `wandb`.
        config: shown with the run; plain values, nested dictionaries allowed.
        group: runs of one sweep share it.
        run_id: of an earlier part of the same run, which is then gone on with.

    Raises:
        UserError: an unknown kind or mode; mode "online" without an API key; mode "online" or
            "offline" without wandb installed; a project, entity or name that wandb refuses.
    """
    if kind not in ("wandb", "none"):
        raise UserError(f"tracker {kind!r} is unknown: wandb or none")
    if mode not in MODES:
        raise UserError(f"tracker.mode={mode} is unknown: one of {', '.join(MODES)}")
    wish = os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode
    wish = {"dryrun": "offline", "run": "online", "": "auto"}.get(wish, wish)  # wandb's old names
    if wish not in MODES:
        raise UserError(f"WANDB_MODE={wish} is unknown here: online, offline or disabled")
    if kind == "none" or wish == "disabled":
        return Tracker(run_id=run_id)
    # Without this wandb sends telemetry to its server, and where that does not answer the process
    # takes 20 s longer to exit.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError:
        if mode != "auto":
            raise UserError(
                f"tracker.mode={mode} needs wandb, which is not installed: "
                "pip install wandb, or set tracker=none"
            ) from None
        log.warning(
            "wandb is not installed: the run is not tracked by W&B; its files in %s are complete",
            run_dir,
        )
        return Tracker(run_id=run_id)

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

    run_dir.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        silent=True,
        console="off",  # capturing stdout gets in the way of other loggers and progress lines
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
        finish_timeout_raises=True,
    )
    # One id for both attempts: what a failed online start leaves belongs to the same run then.
    # WANDB_RUN_ID is not asked: all jobs of a multirun would be one run.
    identity = run_id or secrets.token_hex(5)
    for attempt in ("offline",) if wish == "offline" else ("online", "offline"):
        try:
            run = wandb.init(
                mode=attempt,  # type: ignore[arg-type]
                project=project,
                entity=entity,
                dir=str(run_dir),
                id=identity,
                resume="allow",
                reinit="finish_previous",
                group=group,
                name=name,
                tags=list(tags),
                job_type="train",
                config=dict(config),
                settings=settings,
            )
            run.define_metric("tokens")
            run.define_metric("*", step_metric="tokens")
        except (ValueError, wandb.errors.UsageError) as error:
            raise UserError(f"wandb refuses the run: {_one_line(error)}") from error
        except Exception as error:
            log.warning(
                "W&B cannot start %s (%s); %s", attempt, _one_line(error),
                "going on offline (WANDB_MODE=offline skips the attempt)"
                if attempt == "online" else f"the files in {run_dir} are complete without it",
            )  # fmt: skip
            # wandb's service goes on holding the id of a run that failed to start.
            _new_session()
        else:
            where = run.url if attempt == "online" else f"wandb sync {run.settings.sync_dir}"
            log.info("W&B run %s, %s: %s", run.id, attempt, where)
            return Tracker(run)
    return Tracker(run_id=run_id)


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
