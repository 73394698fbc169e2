"""Whose a segment is: the lock of a store's directory, and its lineage.

Several directories may hold episodes of one shard: its node was lost and it went on elsewhere, from what was uploaded,
and then that node came back with segments that nobody had seen. So that their segments never pass for each other, each
directory has a lineage, drawn at random when it is first opened and part of its segments' names; and an episode is put
together from the pieces of one lineage only.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
import uuid
from pathlib import Path

LOCK_PATIENCE = 5.0  # seconds: a killed owner's lock goes with its process, which may take a moment


def lock(path: Path) -> int:
    """The directory's lock, which the operating system takes back when the process dies."""
    fd = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    patience = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > patience:
                os.close(fd)
                raise ValueError(
                    f"the store at {path} is being written by another process (or another EpisodeStore of this one); "
                    "close that one, or open this one with read_only=True"
                ) from None
            time.sleep(0.05)
        except OSError:
            return fd  # a file system without locks: nothing to hold on to


def lineage(fd: int) -> str:
    """What is written in the lock file, or is now. Should it be lost, the next one is as good."""
    known = os.pread(fd, 9, 0).decode(errors="replace")
    if re.fullmatch(r"[0-9a-f]{8}", known):
        return known
    fresh = uuid.uuid4().hex[:8]
    os.ftruncate(fd, 0)
    os.pwrite(fd, fresh.encode(), 0)
    return fresh
