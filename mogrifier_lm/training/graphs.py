"""CUDA graphs: a step of many small kernels, launched as one."""

from collections.abc import Callable

import torch
from torch import Tensor

WARMUP = 3  # eager calls before a capture, so that lazily made buffers exist


class Graphed:
    """Runs `function` as one captured CUDA graph for each set of shapes.

    The recurrence launches thousands of kernels of a few microseconds each; a graph takes away
    the time between them. The function must read and write only its arguments and tensors that
    stay where they are, return nothing and draw no random numbers (masks are arguments). Its
    first `WARMUP` calls for each set of shapes run eagerly, so do all calls on a CPU.

    Args:
        function: of tensors (or None), for its effects.
        device: where its tensors live.
    """

    def __init__(self, function: Callable[..., None], device: torch.device) -> None:
        self.function, self.device = function, device
        self.calls: dict[object, int] = {}
        # One pool of memory for all: nothing in it outlives a replay, and they never overlap.
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.graphs: dict[object, tuple[torch.cuda.CUDAGraph, tuple[Tensor | None, ...]]] = {}

    def __call__(self, *args: Tensor | None) -> None:
        """Run on `args`, whose values are copied to where the graph reads them."""
        if self.device.type != "cuda":
            self.function(*args)
            return
        shapes = tuple(None if a is None else tuple(a.shape) for a in args)
        self.calls[shapes] = self.calls.get(shapes, 0) + 1
        if self.calls[shapes] <= WARMUP:
            # On a side stream, as capture wants it of the calls before it.
            side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self.function(*args)
            torch.cuda.current_stream(self.device).wait_stream(side)
            return
        if shapes not in self.graphs:
            static = tuple(None if a is None else a.clone() for a in args)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.function(*static)
            self.graphs[shapes] = graph, static
        graph, static = self.graphs[shapes]
        for place, value in zip(static, args, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        graph.replay()
