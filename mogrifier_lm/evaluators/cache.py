"""The continuous cache: words that followed similar hidden vectors are likely to come again.

Grave et al., arXiv 1612.04426. Shape legend: N tokens, E features, W positions of the largest
window, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mogrifier_lm.evaluators.task import Evaluation, Evaluator, Settings, Task, Text, tune_tokens
from mogrifier_lm.option import CACHE, RATE, SIZE, Interval, option

if TYPE_CHECKING:
    from torch import Tensor

# Tokens at a time: scores of 256 x W stay near a CPU's cores; a GPU wants few large kernels.
CHUNK = {"cpu": 256, "cuda": 4096}


@dataclass(kw_only=True)
class Cache(Evaluator):
    """p = (1 - weight) p_model + weight p_cache, in one pass of the model for all settings.

    p_cache(w) ∝ sum over the last `window` positions i that were followed by w of
    exp(theta h_t . h_i), h what the softmax sees; the first token has no past and p_model alone.
    """

    weight: list[float] = option(
        [0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4],
        "lambda, weight of the cache in the mixture",
        RATE,
        CACHE,
    )
    theta: list[float] = option(
        [0.1, 0.2, 0.3, 0.5, 0.75, 1.0], "sharpness", Interval(above=0, most=1e3), CACHE
    )
    window: list[int] = option([200, 500, 1000, 2000, 4000], "past positions", SIZE, CACHE)
    tune_tokens: int | None = tune_tokens(None)

    def score(self, task: Task, text: Text, trials: Sequence[Settings]) -> Iterator[Evaluation]:
        hidden_NE, nats_N = task.once((type(self), text.name), lambda: self.record(task, text.name))
        return _mix(text, hidden_NE, nats_N, trials)

    def record(self, task: Task, split: str) -> tuple[Tensor, Tensor]:
        """Hidden vectors [N, E] and nats [N] of a split under the static model, batch size 1."""
        from mogrifier_lm.evaluators.captured import encode

        text, model = Text(split, task.splits[split]), task.model
        states, nats_N = model.zero_states(1), model.output_bias.new_empty(len(text))
        hidden_NE = nats_N.new_empty(len(text), model.feature_size)
        for steps, inputs_T1, targets_T1 in task.windows(text, 512, "cache"):
            hidden, states = encode(model, inputs_T1, states)
            hidden_NE[steps] = hidden
            nats_N[steps] = model.output_nats(hidden, targets_T1.flatten())
        return hidden_NE, nats_N.cpu()


@dataclass(kw_only=True)
class DynamicCache(Cache):
    """As `Cache`, on the hidden vectors and probabilities of dynamic evaluation as it was tuned."""

    needs = ("dynamic",)

    def record(self, task: Task, split: str) -> tuple[Tensor, Tensor]:
        evaluation = task.evaluations["dynamic", split]
        assert evaluation.hidden is not None
        return evaluation.hidden, evaluation.nats


def _mix(
    text: Text, hidden_NE: Tensor, nats_N: Tensor, trials: Sequence[Settings]
) -> Iterator[Evaluation]:
    import torch

    size = len(text)
    windows = sorted({min(trial["window"], size) for trial in trials})  # no past is longer
    thetas = sorted({trial["theta"] for trial in trials})
    targets_N = torch.from_numpy(text.split.ids.astype("int64")).to(hidden_NE.device)
    p_cache = cache_probabilities(hidden_NE[:size], targets_N, windows, thetas).cpu()
    log_model_N = -nats_N[:size].double()
    for trial in trials:
        weight = torch.tensor(trial["weight"], dtype=torch.float64)
        window = windows.index(min(trial["window"], size))
        log_cache_N = p_cache[window, thetas.index(trial["theta"])].log()
        log_cache_N[0] = log_model_N[0]  # no past yet
        yield Evaluation(
            -torch.logaddexp((1 - weight).log() + log_model_N, weight.log() + log_cache_N)
        )


def cache_probabilities(
    hidden_NE: Tensor, targets_N: Tensor, windows: Sequence[int], thetas: Sequence[float]
) -> Tensor:
    """p_cache of each target under every window and theta.

    The scalar products are computed once; windows are nested, so each adds the positions that the
    smaller ones lack.

    Args:
        hidden_NE: h_t, that predicts target t.
        targets_N: the words that followed.
        windows: rising.
        thetas: above 0.

    Returns:
        [windows, thetas, N] float64; that of the first token is no number.
    """
    import torch

    W, N = windows[-1], len(targets_N)
    keys = torch.cat([hidden_NE.new_zeros(W, hidden_NE.shape[1]), hidden_NE])
    words = torch.cat([targets_N.new_full((W,), -1), targets_N]).unfold(0, W, 1)
    distances_W = torch.arange(W, 0, -1, device=hidden_NE.device)
    p = hidden_NE.new_empty(len(windows), len(thetas), N, dtype=torch.float64)
    chunk = CHUNK[hidden_NE.device.type]
    for start in range(0, N, chunk):
        stop = min(start + chunk, N)
        times_C1 = torch.arange(start, stop, device=hidden_NE.device).unsqueeze(1)
        products = hidden_NE[start:stop] @ keys[start : stop + W - 1].T
        # Row r holds its past in columns r to r + W - 1: a view that walks down the diagonal.
        scores_CW = products.as_strided((stop - start, W), (products.stride(0) + 1, 1))
        if start < W:
            scores_CW = scores_CW.masked_fill(distances_W > times_C1, -torch.inf)
        hits_CW = (words[start:stop] == targets_N[start:stop, None]).to(scores_CW.dtype)
        for k, theta in enumerate(thetas):
            top = scores_CW.new_full((stop - start, 1), torch.finfo(scores_CW.dtype).min)
            total = hit = torch.zeros_like(top)
            right = W
            for w, window in enumerate(windows):
                columns = slice(W - window, right)
                scores, right = scores_CW[:, columns], W - window
                new_top = torch.maximum(top, scores.amax(1, keepdim=True))
                weights = (theta * (scores - new_top)).exp_()
                scale = (theta * (top - new_top)).exp_()
                total = total * scale + weights.sum(1, keepdim=True)
                hit = hit * scale + (weights * hits_CW[:, columns]).sum(1, keepdim=True)
                p[w, k, start:stop] = (hit / total).squeeze(1)
                top = new_top
    return p
