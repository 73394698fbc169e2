"""Asking the kernel for memory-mapped rows before they are copied, where they are not in memory yet."""

from __future__ import annotations

import ctypes
import mmap
import resource
from collections.abc import Iterable

import numpy as np

WILLNEED = 3  # MADV_WILLNEED
WARM = 16  # copies without a fault from disk, after which the kernel is no longer asked
_THREAD = getattr(resource, "RUSAGE_THREAD", None)  # Linux has it


class ReadAhead:
    """Copies arrays, in two passes while pages come from disk: all are asked for, so that the disk works on them at
    once, and then copied. Asking for what is in memory costs a tenth of copying it, so it begins with a page fault that
    read the disk (which the kernel counts) and ends after ``WARM`` calls without one."""

    def __init__(self) -> None:
        self.faults = 0  # pages that a copy waited for, ever
        self._cold = 0  # calls for which to go on asking

    def copy(self, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Copy each (to, source)."""
        if _THREAD is None:
            for to, source in pairs:
                to[...] = source
            return
        if self._cold:
            pairs = list(pairs)
            for _, source in pairs:
                _ask(source)
        before = resource.getrusage(_THREAD).ru_majflt
        for to, source in pairs:
            to[...] = source
        faults = resource.getrusage(_THREAD).ru_majflt - before
        self.faults += faults
        self._cold = WARM if faults else max(0, self._cold - 1)


def _ask(source: np.ndarray) -> None:
    """Best effort: memory that is not mapped from a file has nothing to read, and the kernel's answer is ignored."""
    if not source.nbytes or not source.flags.c_contiguous:
        return
    address = source.__array_interface__["data"][0]
    start = address - address % mmap.PAGESIZE
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + source.nbytes - start), WILLNEED)


_libc = ctypes.CDLL(None)
