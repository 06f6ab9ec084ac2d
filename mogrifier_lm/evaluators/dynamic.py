"""Dynamic evaluation: the weights learn from each window after it has been scored.

Krause et al., arXiv 1709.07432 (DYN); also as in the Mogrifier's released code (LAMB).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mogrifier_lm.evaluators.task import (
    Evaluation,
    Settings,
    Task,
    Tempered,
    Text,
    tune_tokens,
)
from mogrifier_lm.option import COUNT, DYNAMIC, LAMB, SIZE, TEMPERATURE, Interval, option

if TYPE_CHECKING:
    from torch import Tensor

    from mogrifier_lm.model import LanguageModel, States


@dataclass(kw_only=True)
class Dynamic(Tempered):
    """Score each window, then move the weights by its gradient and back towards the trained ones.

    rule "rms" (DYN, equations 4 to 6), with g the gradient of the window's mean nats per token,
    without dropout, and rms = sqrt(mean g^2) over windows of training text:

        w <- w - lr g / (rms + epsilon) + min(1, decay rms / mean(rms)) (w_trained - w)

    rule "sgd": w <- w - lr g + decay (w_trained - w). Batch size 1; the trained weights are back,
    bit for bit, when a text is done or an error ends it.
    """

    window: int = option(20, "tokens between updates", SIZE)
    rule: str = option("rms", "update", ("rms", "sgd"), DYNAMIC)
    mean: str = option(
        "elements",
        "mean of the rms in the decay: over all elements (LAMB), or of the tensors' means (DYN)",
        ("elements", "tensors"),
        "LAMB, arXiv 1709.07432",
    )
    lr: list[float] = option([2e-4, 4e-4, 8e-4, 1.6e-3], "learning rate", Interval(0, 1e4))
    decay: list[float] = option(
        [1e-3, 1e-2], "pull to the trained weights", Interval(0, 1), DYNAMIC
    )
    epsilon: list[float] = option(
        [1e-4], "rms: added to the root mean square", Interval(above=0, most=1e3)
    )
    temperature: list[float] = option(
        [1.0], "divides the logits that score a window; it learns at 1", TEMPERATURE, LAMB
    )
    statistics_tokens: int | None = option(100_000, "rms: training tokens; null: all", COUNT)
    statistics_batch_size: int = option(20, "rms: streams over them", SIZE)
    tune_tokens: int | None = tune_tokens(10_000)

    def score_at(
        self, task: Task, text: Text, settings: Settings, temperatures: Sequence[float]
    ) -> Iterator[Evaluation]:
        import torch

        from mogrifier_lm.evaluators.captured import flattened, nested
        from mogrifier_lm.kernels.graphs import Graphed
        from mogrifier_lm.model import restored

        model, params = task.model, list[torch.Tensor](task.model.parameters())
        rms = root_mean_squares(task, settings) if settings["rule"] == "rms" else []
        factors = coefficients(params, settings, rms)
        states = model.zero_states(1)
        sizes = [len(state) for state in states]
        nats_KN = model.output_bias.new_empty(len(temperatures), len(text))
        hidden_NE = nats_KN.new_empty(len(text), model.feature_size) if text.with_hidden else None
        with restored(params) as trained:

            def learn(inputs_T1: Tensor, targets_T1: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
                """Score a window, then move the weights in their place."""
                before = nested(flat, sizes)
                gradients, hidden, after = window_gradients(model, inputs_T1, targets_T1, before)
                targets_T = targets_T1.flatten()
                found = [model.output_nats(hidden, targets_T, t) for t in temperatures]
                move(params, trained, gradients, factors)
                return *found, hidden, *flattened(after)

            graphed = Graphed(learn, params[0].device)
            for steps, inputs_T1, targets_T1 in task.windows(text, settings["window"], "dynamic"):
                results = graphed(inputs_T1, targets_T1, *flattened(states))
                for nats_N, nats_T in zip(nats_KN, results, strict=False):
                    nats_N[steps] = nats_T
                hidden, *flat = results[len(nats_KN) :]
                states = nested(flat, sizes)
                if hidden_NE is not None:
                    hidden_NE[steps] = hidden
        for nats_N in nats_KN.cpu():
            yield Evaluation(nats_N, hidden=hidden_NE)


def window_gradients(
    model: LanguageModel, inputs_TB: Tensor, targets_TB: Tensor, states: States
) -> tuple[tuple[Tensor, ...], Tensor, States]:
    """Of the mean nats per token, without dropout; the hidden vectors; the states after."""
    import torch

    from mogrifier_lm.data import IGNORE

    with torch.enable_grad():
        hidden, states = model.encode(inputs_TB, states)
        mean = model.output_loss(hidden, targets_TB.flatten()) / (targets_TB != IGNORE).sum()
    params = list(model.parameters())
    gradients = torch.autograd.grad(mean, params, allow_unused=True, materialize_grads=True)
    return gradients, hidden.detach(), [tuple(s.detach() for s in state) for state in states]


def move(
    params: list[Tensor],
    trained: list[Tensor],
    gradients: tuple[Tensor, ...],
    factors: tuple[list[Tensor], list[Tensor]],
) -> None:
    """Update the weights in their place; `factors` are what `coefficients` returned."""
    import torch

    step_sizes, pulls = factors
    with torch.no_grad():
        torch._foreach_lerp_(params, trained, pulls)
        torch._foreach_addcmul_(params, gradients, step_sizes, value=-1)


def coefficients(
    params: Sequence[Tensor], settings: Settings, rms: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each parameter the factor on its gradient, and its pull towards the trained weights.

    Args:
        params: of the model.
        settings: of `Dynamic`, a value each.
        rms: of their gradients, where the rule is "rms".
    """
    lr, decay = settings["lr"], settings["decay"]
    if settings["rule"] == "sgd":
        return [p.new_full((), lr) for p in params], [p.new_full((), decay) for p in params]
    if settings["mean"] == "elements":
        mean = sum(r.sum() for r in rms) / sum(r.numel() for r in rms)
    else:
        mean = sum(r.mean() for r in rms) / len(rms)
    steps = [lr / (r + settings["epsilon"]) for r in rms]
    return steps, [(decay / mean * r).clamp_(max=1) for r in rms]


def root_mean_squares(task: Task, settings: Settings) -> list[Tensor]:
    """sqrt(mean g^2) for each parameter, over windows at the beginning of the training text."""
    window, tokens, batch_size = (
        settings[k] for k in ("window", "statistics_tokens", "statistics_batch_size")
    )

    def gather() -> list[Tensor]:
        import torch

        from mogrifier_lm.evaluators.captured import flattened, nested
        from mogrifier_lm.kernels.graphs import Graphed

        model, train = task.model, task.splits["train"]
        text = Text("train", replace(train, ids=train.ids[:tokens]))
        squares = [torch.zeros_like(p) for p in model.parameters()]
        streams = min(batch_size, len(text))
        states, count = model.zero_states(streams), 0
        sizes = [len(state) for state in states]

        def add(inputs_TB: Tensor, targets_TB: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            before = nested(flat, sizes)
            gradients, _, after = window_gradients(model, inputs_TB, targets_TB, before)
            torch._foreach_addcmul_(squares, gradients, gradients)
            return tuple(flattened(after))

        graphed = Graphed(add, model.output_bias.device)
        for _, inputs_TB, targets_TB in task.windows(text, window, "statistics", streams):
            states = nested(graphed(inputs_TB, targets_TB, *flattened(states)), sizes)
            count += 1
        return [s.div_(count).sqrt_() for s in squares]

    return task.once(("rms", window, tokens, batch_size), gather)
