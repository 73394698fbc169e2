"""Every random stream of a run, derived from the run's one seed and a name.

No generator is ever saved: a stream is found again from its path, so a resumed phase draws what it drew before, and
what an episode or a dream draws does not depend on which worker plays it.
"""

from __future__ import annotations

import zlib

import numpy as np


def derive(seed: int, *path: int | str) -> int:
    """A 63-bit seed for the stream named by `path`, e.g. ``derive(0, "collect", "env", 17)``."""
    words = [zlib.crc32(p.encode()) if isinstance(p, str) else int(p) for p in path]
    state = np.random.SeedSequence([int(seed), *words]).generate_state(1, np.uint64)[0]
    return int(state) & (2**63 - 1)


def rng(seed: int, *path: int | str) -> np.random.Generator:
    """A numpy generator for the stream named by `path`."""
    return np.random.default_rng(derive(seed, *path))
