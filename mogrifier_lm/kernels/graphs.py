"""CUDA graphs: a step of many small kernels, launched as one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARMUP = 3  # eager calls before the first capture, so that lazily made buffers exist


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` for which the host does not wait; itself where it is there already."""
    if device.type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Graphed:
    """Runs `function` as one captured CUDA graph for each set of shapes.

    The recurrence launches thousands of kernels of a few microseconds each; a graph takes away
    the time between them. The function must read and write only its arguments and tensors that
    stay where they are, and draw no random numbers (masks are arguments). Its first `WARMUP` calls
    run eagerly, so does the first call for further shapes, and so do all calls on a CPU.

    Args:
        function: of tensors (or None), which returns a tuple of tensors or None.
        device: where its tensors live.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function, self.device = function, device
        self.calls = 0
        # One pool of memory for all: nothing in it outlives a replay, and they never overlap.
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.graphs: dict[object, tuple[torch.cuda.CUDAGraph, tuple[Tensor | None, ...], Any]] = {}
        self.known: set[object] = set()  # shapes that have run eagerly

    def __call__(self, *args: Tensor | None) -> Any:
        """Run on `args`, whose values are copied to where the graph reads them.

        Returns:
            What the function returns; of what a graph has written, copies.
        """
        if self.device.type != "cuda":
            return self.function(*args)
        case = tuple(None if a is None else (a.shape, a.dtype) for a in args)
        if case not in self.graphs:
            self.calls += 1
            if case not in self.known or self.calls <= WARMUP:
                self.known.add(case)
                return self._warm_up(*args)
            self.graphs[case] = self._capture(*args)
        graph, places, result = self.graphs[case]
        for place, value in zip(places, args, strict=True):
            if place is not None and value is not None:
                place.copy_(value, non_blocking=True)
        graph.replay()
        return None if result is None else tuple(tensor.clone() for tensor in result)

    def _warm_up(self, *args: Tensor | None) -> Any:
        """An eager call, on a side stream, as capture wants it of the calls before it."""
        side, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = self.function(*args)
        current.wait_stream(side)
        return result

    def _capture(self, *args: Tensor | None) -> tuple[Any, ...]:
        places = tuple(None if a is None else a.to(self.device, copy=True) for a in args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = self.function(*places)
        return graph, places, result
