"""Data parallelism: the streams of one run divided over the processes that torchrun starts.

Every process holds the whole model and draws the same random numbers; each does its columns of a
window, and all make the same step with the sum of their gradients. So the weights are equal bit for
bit and what a run does does not depend on the number of processes, but for rounding. The first
process alone decides by the clock, validates, and writes files.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mogrifier_lm.errors import UserError
from mogrifier_lm.machine import PROCESSES, RANK

Value = TypeVar("Value")


class Processes:
    """The processes of a run, this one among them; alone, every method is the plain thing.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.size = RANK, PROCESSES
        if self.size > 1:
            if not dist.is_initialized():
                both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                # The others wait as long as the first reads data and validates; one that has died
                # is known at once by its connection.
                dist.init_process_group(both, timeout=timedelta(days=1))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> str:
        """cuda is one device a process.

        Raises:
            UserError: one device for several processes.
        """
        if name.startswith("cuda:") and self.size > 1:
            raise UserError(f"trainer.device={name}: with torchrun cuda, one device a process")
        return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and self.size > 1 else name

    def columns(self, number: int) -> slice:
        """This process's share of `number` columns, which `size` divides."""
        share = number // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def first(self, compute: Callable[[], Value]) -> Value:
        """What `compute` gives in the first process; the others wait for it."""
        if self.size == 1:
            return compute()
        box = [compute() if self.is_first else None]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def in_turn(self, compute: Callable[[], Value]) -> Value:
        """What `compute` gives here; the others begin once the first, which fills caches, ends."""
        if self.is_first:
            value = compute()
            self.first(lambda: None)
            return value
        self.first(lambda: None)
        return compute()

    def clock(self) -> float:
        """Seconds, the first process's, so that all decide alike."""
        if self.size == 1:
            return time.monotonic()
        now = torch.tensor(time.monotonic(), dtype=torch.float64)
        dist.broadcast(now, 0)
        return float(now)

    def most(self, number: int) -> int:
        """The largest of what the processes give."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def add_up(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one after the other along their first dimension."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def leave(self) -> None:
        """End what the processes have in common: each is alone from here on."""
        if self.size > 1:
            dist.destroy_process_group()
            self.size = 1
