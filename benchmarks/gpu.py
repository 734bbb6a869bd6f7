"""Device time of a call, which the benchmarks of single kernels share."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor


def milliseconds(run: Callable[[], object], repeats: int, flush: Tensor | None = None) -> tuple[float, bool]:
    """Median device time of a call by events, and whether it was replayed from a CUDA graph.

    A call that waits for the host cannot be captured; the wait is part of its time then. ``flush``, a tensor larger
    than any cache, is written before each call.
    """
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    play: Callable[[], object] = run
    graph, captured = torch.cuda.CUDAGraph(), True
    try:
        with torch.cuda.graph(graph):
            run()
        play = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        captured = False
    times = []
    for _ in range(repeats):
        if flush is not None:
            flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        play()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), captured
