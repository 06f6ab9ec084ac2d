"""Files for `wandb sweep`, made from the project's own named grids and search ranges."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.job import compose_grid
from mogrifier_lm.search.ranges import Range, check, read_space

COMMAND = ("${env}", "${interpreter}", "${program}", "tracker.mode=online")
FEWEST_VALIDATIONS = 30
"""Before Hyperband may end a run; then again after three, nine, ... times as many."""


def grid_file(name: str, overrides: Sequence[str]) -> str:
    """The yaml of a W&B sweep over the grid configs/sweep/NAME.yaml.

    Args:
        name: of the grid.
        overrides: of each of its runs.

    Raises:
        UserError: a sweep without a grid; or an error of Hydra's.
    """
    values = compose_grid([f"sweep={name}", *overrides])
    if not values:
        raise UserError(f"sweep={name} has no grid of its own: name one of configs/sweep/")
    parameters = {key: {"values": [_plain(v) for v in texts]} for key, texts in values.items()}
    # What the sweep sets beside its grid comes with its name; without its grid it is one run.
    fixed = [f"sweep={name}", *overrides, "hydra.mode=RUN"]
    return _file("grid", "valid/static/ppl", fixed, parameters)


def search_file(name: str, overrides: Sequence[str]) -> str:
    """The yaml of a Bayesian W&B sweep over a space of scripts/search.py, with Hyperband.

    W&B has no range with null beside it: such a one becomes null and five of its numbers.

    Args:
        name: of the space, or a file like mogrifier_lm/search/NAME.yaml.
        overrides: of each run; a key among them is not searched.

    Raises:
        UserError: a space, a key or an override that does not fit; or an error of Hydra's.
    """
    given = {override.partition("=")[0] for override in overrides}
    space = {key: r for key, r in read_space(name).items() if key not in given}
    whole = check(space, overrides)
    parameters = {key: _parameter(r, whole[key]) for key, r in space.items()}
    stop = {"type": "hyperband", "min_iter": FEWEST_VALIDATIONS, "eta": 3}
    return _file("bayes", "valid/ppl", overrides, parameters, early_terminate=stop)


def _file(
    method: str, metric: str, fixed: Sequence[str], parameters: Mapping[str, Any], **more: Any
) -> str:
    values: dict[str, Any] = {"program": "train.py", "method": method}
    values |= {"metric": {"name": metric, "goal": "minimize"}, **more}
    values |= {"command": [*COMMAND, *fixed, "${args_no_hyphens}"], "parameters": dict(parameters)}
    return str(yaml.safe_dump(values, sort_keys=False))


def _parameter(r: Range, whole: bool) -> dict[str, Any]:
    if r.choices:
        return {"values": ["null" if choice is None else choice for choice in r.choices]}
    assert r.low is not None and r.high is not None
    if r.or_null:
        steps = [r.low + i * (r.high - r.low) / 4 for i in range(5)]
        return {"values": ["null", *dict.fromkeys(round(x) if whole else x for x in steps)]}
    low, high = (int(r.low), int(r.high)) if whole else (float(r.low), float(r.high))
    kind = ("q_log_uniform_values" if r.log else "int_uniform") if whole else (
        "log_uniform_values" if r.log else "uniform"
    )  # fmt: skip
    return {"distribution": kind, "min": low, "max": high}


def _plain(text: str) -> Any:
    """A number where it is one; a word, null among them, stays a word."""
    value = yaml.safe_load(text)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text
