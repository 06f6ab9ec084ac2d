import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    return cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="sum")


def token_nats(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="none")
