"""How a run is called in W&B: an override beats W&B's own variables, which beat the default."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

LONGEST_NAME, LONGEST_TAG = 128, 64
"""Characters that the server takes."""


def wished(variable: str, key: str, value: str | None, overrides: Sequence[str]) -> str | None:
    """What a variable, WANDB_PROJECT say, says of a key, unless the command line overrides it."""
    if any(override.startswith(f"{key}=") for override in overrides):
        return value
    return os.environ.get(variable) or value


def tags(given: Sequence[str], overrides: Sequence[str], names: Sequence[str] = ()) -> list[str]:
    """Those of tracker.tags or WANDB_TAGS, and names beside them, as long as they may be."""
    wish = wished("WANDB_TAGS", "tracker.tags", None, overrides)
    asked = [tag.strip() for tag in wish.split(",")] if wish else given
    return list(dict.fromkeys(tag[:LONGEST_TAG] for tag in (*asked, *names) if tag))


def cut(name: str) -> str:
    """A name as long as it may be, without its beginning: what is swept stands at the end."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def sweep_name(folder: Path) -> str:
    """The folder's name; of one that is named by date and time, both."""
    folder = folder.resolve()
    by_time = re.fullmatch(r"\d\d-\d\d-\d\d(_\d+)?", folder.name)
    return "_".join(folder.parts[-2:]) if by_time else folder.name


def short_name(overrides: Sequence[str]) -> str:
    """What tells a run from others: rounds=3,seed=1 of model.rounds=3 and seed=1.

    A key keeps its whole path where its last part alone would be another key's too.
    """
    skipped = ("tracker", "sweep=", "data.dir=", "data.cache_dir=")
    pairs = [o.lstrip("+").split("=", 1) for o in overrides if not o.startswith(skipped)]
    last = [pair[0].rpartition(".")[2] for pair in pairs]
    return ",".join(
        "=".join([key if last.count(short) > 1 else short, *value])
        for short, (key, *value) in zip(last, pairs, strict=True)
    )
