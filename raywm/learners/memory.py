"""Keeping a process's memory: what a training step frees, the next one takes again."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_memory() -> None:
    """Let glibc keep freed memory instead of giving it back to the system: large tensors would be mapped anew at every
    use, and the kernel clears their pages each time, a fifth of a Dreamer update on a CPU. The process stays as large
    as its largest moment. Does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 * 2**20)):
            libc.mallopt(parameter, value)
