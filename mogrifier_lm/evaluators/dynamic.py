"""Dynamic evaluation: the weights learn from each window after it has been scored.

Krause et al., arXiv 1709.07432 (DYN); also as in the Mogrifier's released code (LAMB).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mogrifier_lm.data import IGNORE
from mogrifier_lm.evaluators.captured import flattened, nested
from mogrifier_lm.evaluators.task import Evaluation, Settings, Task, Text, by_temperature
from mogrifier_lm.kernels.graphs import Graphed
from mogrifier_lm.model import LanguageModel, States, restored


def dynamic(task: Task, text: Text, trials: Sequence[Settings]) -> Iterator[Evaluation]:
    """Score each window, then move the weights by its gradient and back towards the trained ones.

    rule "rms" (DYN, equations 4 to 6), with g the gradient of the window's mean nats per token,
    without dropout, and rms = sqrt(mean g^2) over windows of training text:

        w <- w - lr g / (rms + epsilon) + min(1, decay rms / mean(rms)) (w_trained - w)

    rule "sgd": w <- w - lr g + decay (w_trained - w). Batch size 1; the trained weights are back,
    bit for bit, when a text is done or an error ends it.

    Settings:
        window: tokens between updates.
        rule: "rms" or "sgd".
        mean: of the rms, over all "elements" (LAMB) or as the mean of the means of "tensors" (DYN).
        lr, decay, epsilon: as above.
        temperature: factor on the logits that score a window; it learns at 1.
        statistics_tokens, statistics_batch_size: of the training text and its streams.
    """
    for settings, temperatures in by_temperature(trials):
        yield from _adapt(task, text, settings, temperatures)


def _adapt(
    task: Task, text: Text, settings: Settings, temperatures: Sequence[float]
) -> Iterator[Evaluation]:
    model, params = task.model, list[Tensor](task.model.parameters())
    steps, pulls = _coefficients(task, settings)
    states, hiddens = model.zero_states(1), []
    sizes = [len(state) for state in states]
    nats: list[list[Tensor]] = [[] for _ in temperatures]
    with restored(params) as trained:

        def learn(inputs_T1: Tensor, targets_T1: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            """Score a window, then move the weights in their place."""
            before = nested(flat, sizes)
            gradients, hidden, after = _gradients(model, params, inputs_T1, targets_T1, before)
            targets_T = targets_T1.flatten()
            found = [model.output_nats(hidden, targets_T, t) for t in temperatures]
            with torch.no_grad():
                torch._foreach_lerp_(params, trained, pulls)
                torch._foreach_addcmul_(params, gradients, steps, value=-1)
            return *found, hidden, *flattened(after)

        graphed = Graphed(learn, params[0].device)
        for inputs_T1, targets_T1 in task.windows(text, settings["window"], "dynamic"):
            results = graphed(inputs_T1, targets_T1, *flattened(states))
            for found, nats_T in zip(nats, results, strict=False):
                found.append(nats_T)
            hidden, *flat = results[len(nats) :]
            states = nested(flat, sizes)
            if "dynamic" in task.keep:
                hiddens.append(hidden)
    for found in nats:
        nats_N = torch.cat(found).cpu()
        if hiddens:
            task.memo["dynamic", text.name] = torch.cat(hiddens), nats_N
        yield Evaluation(nats_N)


def _gradients(
    model: LanguageModel,
    params: Sequence[Tensor],
    inputs_TB: Tensor,
    targets_TB: Tensor,
    states: States,
) -> tuple[tuple[Tensor, ...], Tensor, States]:
    """Of the mean nats per token, without dropout; the hidden vectors; the states after."""
    with torch.enable_grad():
        hidden, states = model.encode(inputs_TB, states)
        mean = model.output_loss(hidden, targets_TB.flatten()) / (targets_TB != IGNORE).sum()
    gradients = torch.autograd.grad(mean, params, allow_unused=True, materialize_grads=True)
    return gradients, hidden.detach(), [tuple(s.detach() for s in state) for state in states]


def _coefficients(task: Task, settings: Settings) -> tuple[list[Tensor], list[Tensor]]:
    """For each parameter the factor on its gradient, and its pull towards the trained weights."""
    lr, decay = settings["lr"], settings["decay"]
    if settings["rule"] == "sgd":
        scalars = [
            [p.new_full((), value) for p in task.model.parameters()] for value in (lr, decay)
        ]
        return scalars[0], scalars[1]
    rms = root_mean_squares(task, settings)
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
    key = "rms", f"{window} {tokens} {batch_size}"
    if key not in task.memo:
        model, params, train = task.model, list(task.model.parameters()), task.splits["train"]
        text = Text("train", replace(train, ids=train.ids[:tokens]))
        squares = [torch.zeros_like(p) for p in params]
        batch_size = min(batch_size, len(text))
        states, count = model.zero_states(batch_size), 0
        sizes = [len(state) for state in states]

        def add(inputs_TB: Tensor, targets_TB: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            before = nested(flat, sizes)
            gradients, _, after = _gradients(model, params, inputs_TB, targets_TB, before)
            torch._foreach_addcmul_(squares, gradients, gradients)
            return tuple(flattened(after))

        graphed = Graphed(add, params[0].device)
        for inputs_TB, targets_TB in task.windows(text, window, "statistics", batch_size):
            states = nested(graphed(inputs_TB, targets_TB, *flattened(states)), sizes)
            count += 1
        task.memo[key] = [s.div_(count).sqrt_() for s in squares]
    rms: list[Tensor] = task.memo[key]
    return rms
