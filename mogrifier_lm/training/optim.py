"""Optimizers, learning rates and averages of the weights by name."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mogrifier_lm.options import OptimizerConfig, TrainerConfig
from mogrifier_lm.training.averaging import RULES, Averaging

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": torch.optim.RAdam,
}
UNFUSED = ("radam",)  # torch has no form of these that updates in one pass over memory


def build_optimizer(config: OptimizerConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """That of the config; weight decay is in the gradient, after clipping, but for AdamW."""
    parameters = list(parameters)
    on_gpu = parameters[0].is_cuda
    options: dict[str, Any] = {
        # As a tensor the rate can change under a captured CUDA graph.
        "lr": torch.tensor(config.lr, device=parameters[0].device) if on_gpu else config.lr,
        "weight_decay": config.weight_decay,
        # Fused: in one pass over memory, a fifth of the plain loops' time on a CPU.
        "foreach" if config.name in UNFUSED else "fused": True,
    }
    if config.name != "sgd":
        options |= {"betas": (config.beta1, config.beta2), "eps": config.eps}
        options["capturable"] = on_gpu
    return OPTIMIZERS[config.name](parameters, **options)


def lr_factor(config: TrainerConfig, step: int, share: float) -> float:
    """Factor on the learning rate: the warm-up's times the decay's.

    It is what torch's ChainedScheduler gives of LinearLR and CosineAnnealingLR; those count steps
    of their own, and this follows where training stands, so that a run goes on with further
    limits, and with windows and rates (lr_drop) that change, by nothing but its progress.

    Args:
        config: its `warmup_steps` and `lr_decay`.
        step: steps done.
        share: of the training that is done, in [0, 1].
    """
    decay = {"none": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
    return min(1.0, (step + 1) / max(1, config.warmup_steps)) * decay[config.lr_decay]


def set_lr(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give all parameters the same rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # on a GPU, where a captured graph reads it
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def build_averaging(
    config: OptimizerConfig, parameters: Iterable[Tensor], total_steps: int | None
) -> Averaging:
    """The rule that `config.averaging` names; `total_steps` is the length of the training."""
    patience = config.averaging_patience
    start = None if total_steps is None else round(config.averaging_start * total_steps)
    options: dict[str, dict[str, Any]] = {
        "nt_asgd": {"nonmono": patience},
        "tail": {"patience": patience, "start_step": start if config.averaging_start else 0},
        "ema": {"decay": config.averaging_decay},
        "two_tailed": {"patience": patience},
    }
    return RULES[config.averaging](parameters, **options.get(config.averaging, {}))
