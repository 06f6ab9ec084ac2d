"""The loss of the output layer: the definition that its fast siblings are tested against."""

import torch
from torch import Tensor
from torch.nn.functional import linear, nll_loss


def nats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_prior: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """-ln p of each target: p = softmax(hidden @ weight.T + bias), or a mixture of M of these.

    A mixture is p = sum_m prior_m softmax_m: Mixture of Softmaxes (Yang et al., arXiv 1711.03953),
    or the multi-sample dropout objective (Melis, arXiv 2211.01848), whose prior is 1 / samples.
    Under `torch.autocast` the product runs in its dtype, the softmax in float32 at least.

    Args:
        hidden: [N, E], or [N * M, E] with the components of one target side by side.
        weight: [V, E].
        bias: [V] or None.
        targets: [N] int64.
        log_prior: [N, M] of a mixture of M softmaxes, or None.
        ignore_index: the target that scores zero.

    Returns:
        [N], in float32 at least.
    """
    logits = linear(hidden, weight, bias)
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    if log_prior is not None:
        log_p = (log_p.view(*log_prior.shape, log_p.shape[1]) + log_prior.unsqueeze(2)).logsumexp(1)
    return nll_loss(log_p, targets, ignore_index=ignore_index, reduction="none")


def loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_prior: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """The sum of `nats`, which documents the arguments."""
    return nats(hidden, weight, bias, targets, log_prior, ignore_index).sum()


@torch.no_grad()
def token_nats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_prior: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """`nats` without gradient, [N] float32."""
    return nats(hidden, weight, bias, targets, log_prior, ignore_index).float()
