"""Batches made ready by a thread while others are trained on."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Protocol

import numpy as np
import torch

from raywm.data.batch import Batch


class Source(Protocol):
    """What batches come from: a ``Replay``, or shards of it."""

    def sample(self, B: int, T: int, rng: np.random.Generator, out: Batch | None = None) -> Batch:
        """B sequences of T rows, into `out` where given."""


class Prefetch:
    """Keeps `depth` batches ready: what ``source.sample(B, T, rng)`` gives, in that order, but earlier.

    Batches lie in 2 * depth preallocated ones, which are filled again and again: what ``next`` returns stays as it is
    during depth - 1 further calls. For a CUDA `device` they are page-locked, and move by a stream of their own into
    tensors that stay. Only the thread uses `rng`. As a context manager it closes itself.

    Attributes: ``waited``, the seconds that ``next`` has waited in all.
    """

    def __init__(
        self,
        source: Source,
        B: int,
        T: int,
        rng: np.random.Generator,
        depth: int = 3,
        device: str | torch.device = "cpu",
    ):
        if depth < 1:
            raise ValueError(f"depth={depth}, expected at least 1 batch ahead")
        self.source, self.B, self.T, self.rng, self.depth, self.device = source, B, T, rng, depth, torch.device(device)
        self.waited = 0.0
        self._changed = threading.Condition()
        self._ready: deque[tuple[Batch, Any]] = deque()  # with the event of its arrival on the device, if it moves
        self._lent: deque[Batch] = deque()
        self._spare: deque[tuple[Batch, Any]] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="raywm-prefetch", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The next batch. Raises what the source raised, after what came before that; ValueError when closed."""
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            self.waited += time.perf_counter() - began
            if self._closed:
                raise ValueError("the prefetcher is closed, expected it open; make another one")
            if not self._ready:
                assert self._error is not None
                raise self._error
            batch, event = self._ready.popleft()
            if event is None:
                self._lent.append(batch)
                if len(self._lent) > self.depth:
                    self._spare.append((self._lent.popleft(), None))
            self._changed.notify_all()
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for tensor in batch.leaves().values():
                tensor.record_stream(stream)  # its memory belongs to the other stream, and may not go back too early
        return batch

    def _run(self) -> None:
        try:
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            like: Batch | None = None
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self.depth)
                    if self._closed:
                        return
                    out, event = self._buffer(like, stream is not None)
                if event is not None:
                    event.synchronize()  # until it has been copied from
                batch = like = self.source.sample(self.B, self.T, self.rng, out=out)
                event, ready = None, batch
                if stream is not None:
                    with torch.cuda.stream(stream):
                        ready = batch.to(self.device, non_blocking=True)
                        event = stream.record_event()
                with self._changed:
                    self._ready.append((ready, event))
                    if event is not None and out is not None:  # the first one's memory is not page-locked
                        self._spare.append((batch, event))
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, the consumer must hear of it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _buffer(self, like: Batch | None, cuda: bool) -> tuple[Batch | None, Any]:
        """What to fill next, and the event to wait for before: two are enough where batches move on to a device."""
        if len(self._spare) > cuda:
            return self._spare.popleft()
        return (like.like(pin=True) if cuda and like is not None else None), None

    def close(self) -> None:
        """Stop the thread. Batches already returned stay as they are."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=10)  # a source that hangs must not hang what closes

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
