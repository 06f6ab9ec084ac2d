"""What a search tries: yaml files of key → range, here those that come with the project.

    optimizer.lr: {low: 1e-3, high: 1e-2, log: true}
    model.rank: {low: 1, high: 100, or_null: true}
    optimizer.averaging: {choices: [ema, two_tailed]}

Both ends are included; numbers are whole where the key takes whole ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogrifier_lm.config import read_yaml, validate
from mogrifier_lm.errors import UserError, nearest
from mogrifier_lm.launch.job import compose

if TYPE_CHECKING:
    import optuna

SPACES = Path(__file__).parent


@dataclass(kw_only=True)
class Range:
    """The values of a key: `choices`, or numbers from `low` to `high`, both included.

    Args:
        log: drawn evenly over its logarithm.
        or_null: null is as likely, at first, as a number.
        choices: null, words, numbers or truth values.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    or_null: bool = False
    choices: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if bool(self.choices) == (self.low is not None and self.high is not None):
            raise ValueError("it needs either low and high, or choices")
        least = math.ulp(0) if self.log else -math.inf
        if not self.choices and not least <= self.low <= self.high < math.inf:  # type: ignore[operator]
            raise ValueError("low must not exceed high, and must be above 0 with log")

    @property
    def extremes(self) -> list[Any]:
        """The values at which a run is composed to see whether the range may be."""
        return list(self.choices) or [self.low, self.high, *[None] * self.or_null]

    def suggest(self, trial: "optuna.Trial", key: str, whole: bool) -> Any:
        """What a trial takes.

        Args:
            trial: Optuna's.
            key: of the config, the parameter's name in the study.
            whole: numbers are whole; others get four digits, as a person would write them.

        Returns:
            A number, one of the choices, or None where the range may be null.
        """
        if self.choices:
            return trial.suggest_categorical(key, self.choices)
        if self.or_null and trial.suggest_categorical(f"{key}=null", (False, True)):
            return None
        assert self.low is not None and self.high is not None
        if whole:
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log)
        return float(f"{trial.suggest_float(key, self.low, self.high, log=self.log):.4g}")


def read_space(name: str) -> dict[str, Range]:
    """Key → range, from a file or from spaces/NAME.yaml.

    Raises:
        UserError: there is none, or a range is not one; with its key.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else SPACES / f"{name}.yaml"
    if path.parent == SPACES and not path.is_file():
        known = sorted(p.stem for p in SPACES.glob("*.yaml"))
        raise UserError(f"no space={name}; {nearest(name, known)} A file is space=FILE.yaml")
    values = read_yaml(path)
    if not values:
        raise UserError(f"{path} holds no ranges: {__doc__.splitlines()[2].strip()}")
    space = {}
    for key, value in ((str(key), value) for key, value in values.items()):
        try:
            space[key] = Range(**value)
        except (TypeError, ValueError) as error:
            reason = str(error).replace("Range.__init__() got an ", "")
            reason = reason if isinstance(value, dict) else f"{value} is not a range"
            raise UserError(
                f"{path}: {key}: {reason}; {{low: 1, high: 9}}, with log: true or or_null: true "
                "if you like, or {choices: [1, 2]}"
            ) from error
    return space


def as_override(key: str, value: Any) -> str:
    """A key and its value as an override in Hydra's grammar."""
    words = {"None": "null", "True": "true", "False": "false"}
    return f"{key}={words.get(str(value), str(value))}"


def check(space: Mapping[str, Range], overrides: Sequence[str]) -> dict[str, bool]:
    """Compose a run at the extremes of all ranges, and validate it.

    Returns:
        key → whether it takes whole numbers.

    Raises:
        UserError, or an error of Hydra's: a key, a value or an override that no run can have.
    """
    configs = []
    for values in zip_longest(*(r.extremes for r in space.values()), fillvalue=""):
        extremes = [as_override(k, v) for k, v in zip(space, values, strict=True) if v != ""]
        configs.append(validate(compose([*overrides, *extremes])))
    if not any(vars(configs[0].evaluators).values()):
        raise UserError("evaluators=[]: a search needs the perplexity of one, evaluators=[static]")
    return {key: isinstance(attrgetter(key)(configs[0]), int) for key in space}
