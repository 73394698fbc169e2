"""Asking the kernel for memory-mapped rows before they are copied, where they are not in memory yet."""

from __future__ import annotations

import ctypes
import mmap
import resource

import numpy as np

WILLNEED = 3  # MADV_WILLNEED
WARM = 16  # batches without a fault from disk, after which the kernel is no longer asked
_THREAD = getattr(resource, "RUSAGE_THREAD", None)  # Linux has it


class ReadAhead:
    """Whether the pages that batches are copied from come from disk: then all of a batch should be asked for before the
    first is copied, so that the disk works on them at once.

    Asking for what is in memory costs a tenth of copying it. So it begins with a page fault that read the disk, which
    the kernel counts, and ends after ``WARM`` batches without one.
    """

    def __init__(self) -> None:
        self.faults = 0  # pages that copies waited for, ever
        self._left = 0  # batches for which to go on asking

    @property
    def cold(self) -> bool:
        return self._left > 0

    def count(self) -> int:
        """Faults of this thread so far that read the disk."""
        return resource.getrusage(_THREAD).ru_majflt if _THREAD is not None else 0

    def copied(self, before: int) -> None:
        """A batch has been copied, before which ``count()`` was `before`."""
        faults = self.count() - before
        self.faults += faults
        self._left = WARM if faults else max(0, self._left - 1)

    def ask(self, source: np.ndarray) -> None:
        """Best effort: memory that no file is mapped to has nothing to read, and the kernel's answer is ignored."""
        if not source.nbytes or not source.flags.c_contiguous:
            return
        address = source.__array_interface__["data"][0]
        start = address - address % mmap.PAGESIZE
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + source.nbytes - start), WILLNEED)


_libc = ctypes.CDLL(None)
