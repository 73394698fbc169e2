"""CUDA graphs: the thousands of kernels of an update, recorded once and started by one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from raywm.data.batch import Batch

Run = Callable[[], Any]


class Recorder(Protocol):
    def plain(self, run: Run) -> Any:
        """What a run gives, made where recordings are."""

    def record(self, run: Run) -> tuple[Callable[[], None], Any]:
        """What repeats a run on the tensors it had, and what it gives: there once that has been called."""


class Graphs:
    """A function of a batch that is recorded, once for each shape that batches have, and then replayed.

    The first `PLAIN` batches of a shape are worked through as they are, in which libraries choose and allocate what
    they need. The next is recorded, and from then on what comes is copied to where the recorded one lay. The function
    must make the same calls on the same tensors every time, and wait for nothing.

    Calling it gives what the function gives, which the next call may write over.
    """

    PLAIN = 2

    def __init__(self, function: Callable[[Batch], Any], recorder: Recorder):
        self.function, self.recorder = function, recorder
        self._plain: Counter[Any] = Counter()
        self._made: dict[Any, tuple[Batch, Callable[[], None], Any]] = {}

    def __call__(self, batch: Batch) -> Any:
        leaves = batch.leaves()
        shape = tuple((name, tuple(leaf.shape), leaf.dtype) for name, leaf in leaves.items())
        if shape not in self._made:
            if self._plain[shape] < self.PLAIN:
                self._plain[shape] += 1
                return self.recorder.plain(lambda: self.function(batch))
            place = batch.clone()
            self._made[shape] = (place, *self.recorder.record(lambda: self.function(place)))
        place, replay, result = self._made[shape]
        for name, to in place.leaves().items():
            to.copy_(leaves[name], non_blocking=True)
        replay()
        return result


class Cuda:
    """Records by CUDA graphs. Random numbers of `generators` are those that they would give when it is replayed.

    Raises RuntimeError where CUDA cannot record a run; what the run works on is then in no defined state.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]):
        self.device, self.generators = device, generators
        with torch.cuda.device(device):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def plain(self, run: Run) -> Any:
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                result = run()
            here.wait_stream(self.stream)
        return result

    def record(self, run: Run) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        # other threads, as the one that prefetches batches, go on allocating while this one records
        recording = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.device(self.device), recording:
                result = run()
        except RuntimeError as error:
            raise RuntimeError("the update cannot be recorded as a CUDA graph; set dreamer.cuda_graph=false") from error

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay, result
