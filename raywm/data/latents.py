"""What a model last knew of the rows of a replay: its packed states by the rows' keys, in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

BITS = 12  # of a key within its chunk
ROWS = 1 << BITS


class Latents:
    """Named arrays with one row a key, of the shapes and dtypes that are written first: the state after that row.

    They lie in chunks of 4096 keys, made when something is written to one of them and freed when the last row of them
    is dropped: 1 byte a row more than its arrays have, and nothing is copied to grow. Not safe for threads by itself.
    """

    def __init__(self) -> None:
        self._alive: Counter[int] = Counter()  # rows that are here, by chunk
        self._chunks: dict[int, tuple[dict[str, np.ndarray], np.ndarray]] = {}  # arrays, and which rows are known
        self._layout: dict[str, tuple[tuple[int, ...], np.dtype]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        return sum(known.nbytes + sum(a.nbytes for a in arrays.values()) for arrays, known in self._chunks.values())

    def added(self, key: int, rows: int) -> None:
        """Rows are here from now on: consecutive keys from `key`."""
        for chunk, n in _chunks_of(key, rows):
            self._alive[chunk] += n

    def dropped(self, key: int, rows: int) -> None:
        """These rows are gone; nobody asks for them again."""
        for chunk, n in _chunks_of(key, rows):
            self._alive[chunk] -= n
            if not self._alive[chunk]:
                del self._alive[chunk]
                self._chunks.pop(chunk, None)

    def write(self, keys: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the states (N, *) of rows (N,); of a row given twice the last. Rows whose chunk is gone are passed over.

        Raises ValueError for other names, shapes or dtypes than those of before.
        """
        layout = {name: (array.shape[1:], array.dtype) for name, array in arrays.items()}
        if layout != (self._layout or layout):
            raise ValueError(f"got states {layout}, expected {self._layout}, as they were before")
        if any(len(array) != len(keys) for array in arrays.values()):
            got = {name: len(array) for name, array in arrays.items()}
            raise ValueError(f"got states of {got} rows, expected {len(keys)}, as many as keys")
        self._layout = layout
        for chunk, here, at in _grouped(keys):
            if chunk in self._alive:
                into, known = self._chunk(chunk)
                for name, array in arrays.items():
                    into[name][at] = array[here]
                known[at] = True

    def _chunk(self, chunk: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        if chunk not in self._chunks:
            arrays = {name: np.zeros((ROWS, *shape), dtype) for name, (shape, dtype) in self._layout.items()}
            self._chunks[chunk] = arrays, np.zeros(ROWS, bool)
        return self._chunks[chunk]

    def read(self, keys: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The states of rows (N,), arrays (N, *), and which of them are known (N,); zeros where not."""
        out = {name: np.zeros((len(keys), *shape), dtype) for name, (shape, dtype) in self._layout.items()}
        known = np.zeros(len(keys), bool)
        for chunk, here, at in _grouped(keys):
            if chunk in self._chunks:
                arrays, has = self._chunks[chunk]
                known[here] = has[at]
                for name, array in arrays.items():
                    out[name][here] = array[at]
        return out, known


def _chunks_of(key: int, rows: int) -> Iterator[tuple[int, int]]:
    """(chunk, rows in it) of consecutive keys."""
    stop = key + rows
    while key < stop:
        n = min(stop, ((key >> BITS) + 1) << BITS) - key
        yield key >> BITS, n
        key += n


def _grouped(keys: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(chunk, which of the keys are in it, their rows in it), in the order of the keys."""
    chunks = keys >> BITS
    for chunk in np.unique(chunks).tolist():
        here = np.flatnonzero(chunks == chunk)
        yield chunk, here, keys[here] & ROWS - 1
