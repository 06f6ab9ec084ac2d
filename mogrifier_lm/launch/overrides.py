"""What KEY=VALUE means: in Hydra's grammar, beside other settings, and to a run that goes on."""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from mogrifier_lm.config import Config, load_config, validate
from mogrifier_lm.errors import UserError


def as_values(overrides: Sequence[str]) -> dict[str, str]:
    """key → value of overrides such as model.rounds=2."""
    return dict(override.partition("=")[::2] for override in overrides)


def quoted(text: str) -> str:
    """A text as a value in Hydra's grammar."""
    if re.fullmatch(r"[\w./:@-]+", text, re.ASCII):
        return text
    # A backslash is one except before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + m[2].replace("'", "\\'"), text) + "'"


MOST_RUNS = 100_000  # of a sweep: Hydra makes a list of them all first


def check_grid(overrides: Iterable[Override]) -> None:
    """Refuse the sweep over more values than anyone waits for.

    Raises:
        UserError: it has more than MOST_RUNS runs.
    """
    runs = 1.0
    for override in overrides:
        values: Any = override.value()
        if isinstance(values, ChoiceSweep):
            runs *= len(values.list)
        elif isinstance(values, RangeSweep):
            span = min(abs((values.stop or 0) - (values.start or 0)), 1e18)
            runs *= max(1, span / abs(values.step)) if values.step else math.inf
    if runs > MOST_RUNS:
        raise UserError(f"a sweep of more than {MOST_RUNS:,} runs: give fewer values")


# Keys whose value is one path, which is meant as it is typed.
PATHS = (
    "data.dir",
    "data.cache_dir",
    "tokenizer.vocabulary",
    "trainer.init_from",
    "resume",
    "hydra.run.dir",
    "hydra.sweep.dir",
)


def as_meant(override: str, several: bool = False) -> str:
    """An override whose value is a path, in Hydra's grammar, where ~, =, #, ( and [ mean much else.

    Args:
        override: as it was typed; one in quotes, or with an interpolation, is in the grammar.
        several: values with commas are those of a sweep.
    """
    key, _, value = override.partition("=")
    given = value in ("", "null") or "${" in value or value[0] in "'\""
    if key.lstrip("+") not in PATHS or given or (several and "," in value):
        return override
    return f"{key}={quoted(os.path.expanduser(value))}"


def as_chosen(node: DictConfig, choices: Mapping[str, str], overrides: Sequence[str]) -> None:
    """Let model=lstm be without rounds also where a recipe gives some; model.rounds=N has them.

    Args:
        node: the config, changed in place.
        choices: group → option, as chosen in the end.
        overrides: of the command line.
    """
    if choices["model"] == "lstm" and "model.rounds" not in as_values(overrides):
        node.model.rounds = 0


# Keys that do something only where the condition holds.
EFFECTS: dict[str, Callable[[Config], bool]] = {
    "model.cap_input_gate": lambda c: c.model.cell != "rlstm",  # always capped
    **{
        f"model.{key}": lambda c: c.model.rounds > 0
        for key in ("rank", "share_rounds", "zigzag", "round_bias")
    },
    "model.embedding_ratio": lambda c: c.model.embedding_size is None,
    "regularization.inter_layer_dropout": lambda c: c.model.num_layers > 1,
    "optimizer.averaging_patience": lambda c: c.optimizer.averaging not in ("none", "ema"),
    "optimizer.averaging_start": lambda c: c.optimizer.averaging == "tail",
    "optimizer.averaging_decay": lambda c: c.optimizer.averaging == "ema",
    **{
        f"optimizer.{key}": lambda c: c.optimizer.name != "sgd" for key in ("beta1", "beta2", "eps")
    },
    "trainer.lr_patience": lambda c: c.trainer.lr_drop != 1,
    "data.seed": lambda c: c.data.name == "synthetic",
}


def without_effect(config: Config, overrides: Sequence[str]) -> list[str]:
    """The keys among overrides that do nothing beside the other settings.

    Args:
        config: validated, what the overrides have made.
        overrides: KEY=VALUE, as on the command line.
    """
    keys = [override.partition("=")[0] for override in overrides]
    return [key for key in keys if key in EFFECTS and not EFFECTS[key](config)]


# What may change when a run goes on: limits, what is scored, where it is shown; not what it is.
RESUMABLE = (
    "resume=",
    "data.dir=",
    "data.hub",
    "data.cache_dir=",
    "debug=",
    "evaluators",
    "tracker",
    "report",
    "trainer.max_",
    "trainer.early_stop=",
    "trainer.checkpoint_minutes=",
    "trainer.keep_",
)


def resume_config(
    node: DictConfig,
    path: Path,
    overrides: Sequence[str],
    changeable: Sequence[str] = RESUMABLE,
) -> Config:
    """The saved config of a run, with what this command line changes.

    Args:
        node: the config composed from the command line.
        path: where the run has saved its own.
        overrides: of the command line.
        changeable: what overrides may begin with.

    Raises:
        UserError: an override of something that makes the run what it is.
    """
    saved = OmegaConf.structured(load_config(path))
    for override in overrides:
        if not override.startswith(tuple(changeable)):
            allowed = ", ".join(key.rstrip("=_") for key in changeable)
            raise UserError(
                f"{override} is not what {path.parent} was begun with; what may change is {allowed}"
            )
        key = override.partition("=")[0]
        OmegaConf.update(saved, key, OmegaConf.select(node, key), merge=False)
    return validate(saved)
