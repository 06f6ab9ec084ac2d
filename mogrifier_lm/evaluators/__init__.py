"""Evaluators: a model and a split in, sums of nats, tokens, words and bytes out.

A new one is a function (see `task.Evaluator`) in a file of its own, a line in `EVALUATORS`, its
settings in `options.EvaluatorsConfig` and a yaml in configs/evaluators/. Settings that are lists
are tuned on the validation text.
"""

from mogrifier_lm.evaluators.cache import cache, dynamic_cache
from mogrifier_lm.evaluators.dynamic import dynamic
from mogrifier_lm.evaluators.mc_dropout import mc_dropout
from mogrifier_lm.evaluators.rounds import rounds
from mogrifier_lm.evaluators.score import Score, perplexity
from mogrifier_lm.evaluators.static import static, static_nats, static_score
from mogrifier_lm.evaluators.task import (
    Evaluation,
    Evaluator,
    Result,
    Task,
    Text,
    check_causality,
    evaluate,
)

EVALUATORS: dict[str, Evaluator] = {  # in the order in which they run
    "static": static,
    "dynamic": dynamic,
    "cache": cache,
    "dynamic_cache": dynamic_cache,
    "mc_dropout": mc_dropout,
    "rounds": rounds,
}

__all__ = [
    "EVALUATORS",
    "Evaluation",
    "Evaluator",
    "Result",
    "Score",
    "Task",
    "Text",
    "check_causality",
    "evaluate",
    "perplexity",
    "static_nats",
    "static_score",
]
