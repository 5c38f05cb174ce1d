"""What the contenders share that work through PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
from contender import AttentionRunner
from problem import Attention
from timing import Call, NotCapturableError, first_line


def record(torch: Any, call: Call, calls: int) -> Call:
    """Record so many calls into a CUDA graph of PyTorch's; returns what replays it.

    Raises
    ------
    NotCapturableError
        They can't be recorded; the message says why.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        # thread_local: XLA's threads, where FlashAttention-3 takes part, are none of this.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(calls):
                call()
    except Exception as error:
        raise NotCapturableError(first_line(error)) from error
    replay: Call = graph.replay
    return replay


class TorchRunner(AttentionRunner):
    def __init__(self, problem: Attention, torch: Any) -> None:
        super().__init__(problem)
        self.torch = torch
        self.out: Any = None

    def poison(self) -> None:
        if self.out is not None:
            self.out.fill_(float("nan"))

    def out_bits(self) -> Any:
        bits = self.out.reshape(self.problem.shape).view(self.torch.int16)
        return self.device.xp.from_dlpack(bits).view(np.uint16)

    def capture(self, calls: int) -> Call:
        return record(self.torch, self.call, calls)
