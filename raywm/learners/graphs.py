"""CUDA graphs: the thousands of kernels of an update, recorded once and started by one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raywm.data.batch import Batch

Run = Callable[[], Any]
Record = Callable[[Run], tuple[Callable[[], None], Any]]  # a run -> what repeats it, and what that run gave


class Graphs:
    """A function of a batch that is recorded, once for each shape that batches have, and then replayed.

    The first `PLAIN` batches of a shape are worked through as they are, in which libraries choose and allocate what
    they need. The next is recorded, and from then on what comes is copied to where the recorded one lay. The function
    must make the same calls on the same tensors every time, and wait for nothing.

    Calling it gives what the function gives, which the next call may write over.
    """

    PLAIN = 2

    def __init__(self, function: Callable[[Batch], Any], record: Record):
        self.function, self._record = function, record
        self._plain: Counter[Any] = Counter()
        self._made: dict[Any, tuple[Callable[[], None], dict[str, Tensor], Any]] = {}

    def __call__(self, batch: Batch) -> Any:
        given = batch.leaves()
        shape = tuple((name, tuple(value.shape), value.dtype) for name, value in given.items())
        if shape not in self._made:
            if self._plain[shape] < self.PLAIN:
                self._plain[shape] += 1
                return aside(lambda: self.function(batch)) if batch.action.is_cuda else self.function(batch)
            own = batch.clone()
            self._made[shape] = (*self._record(lambda: self.function(own)), own.leaves())
        replay, result, place = self._made[shape]
        for name, value in given.items():
            place[name].copy_(value, non_blocking=True)
        replay()
        return result


def record(generators: Sequence[torch.Generator]) -> Record:
    """By CUDA graphs, whose random numbers are those that the generators would give then."""

    def recorded(run: Run) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            result = run()
        return graph.replay, result

    return recorded


def aside(run: Run) -> Any:
    """On a stream of its own, as a recording runs: what a library keeps for a stream is then there."""
    stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        result = run()
    here.wait_stream(stream)
    return result
