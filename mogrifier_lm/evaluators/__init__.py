"""Evaluators: a model and a split in, sums of nats, tokens, words and bytes out.

A new one is a function with the signature of `static`, a line in `EVALUATORS`, its settings in
`config.EvaluatorsConfig` and a yaml in configs/evaluators/.
"""

from mogrifier_lm.evaluators.score import Score
from mogrifier_lm.evaluators.static import static

EVALUATORS = {"static": static}

__all__ = ["EVALUATORS", "Score", "static"]
