"""Evaluators: a model and a split in, sums of nats, tokens, words and bytes out.

An evaluator is a file here with a class that holds its settings and scores a text (see
`task.Evaluator`), its line below and a yaml in configs/evaluators/. Settings that are lists are
tuned on the validation text. These files import torch inside functions: the settings are wanted
where a config is composed and nothing computed, by `train.py --help` and at the head of a sweep.
"""

from dataclasses import dataclass

from mogrifier_lm.evaluators.cache import Cache, DynamicCache
from mogrifier_lm.evaluators.dynamic import Dynamic
from mogrifier_lm.evaluators.mc_dropout import MCDropout
from mogrifier_lm.evaluators.rounds import Rounds
from mogrifier_lm.evaluators.static import Static
from mogrifier_lm.evaluators.task import Evaluator


@dataclass(kw_only=True)
class EvaluatorsConfig:
    """All evaluators by name, in the order in which they run; null: not asked for."""

    static: Static | None = None
    dynamic: Dynamic | None = None
    cache: Cache | None = None
    dynamic_cache: DynamicCache | None = None
    mc_dropout: MCDropout | None = None
    rounds: Rounds | None = None

    def chosen(self) -> dict[str, Evaluator]:
        """Those asked for, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}
