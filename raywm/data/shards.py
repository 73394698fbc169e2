"""One batch from several replays: how many sequences each gives, and their weights together.

A prioritised sequence is drawn with the probability priority / all shards' mass, if ``allot`` went by the masses; so
each shard is asked to ``sample(..., density=all rows / all mass)``, and ``merge`` divides by the largest weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raywm.data.batch import Batch, joined
from raywm.data.replay import SHARD_BITS


def allot(B: int, masses: Sequence[float] | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many of B sequences each of S shards gives, (S,) summing to B, by their ``Replay.mass``.

    Systematic resampling: B * share on average, and always the whole number below or above that. Raises ValueError
    where the masses are not masses, or all 0.
    """
    mass = np.asarray(masses, np.float64)
    if mass.ndim != 1 or not (np.isfinite(mass) & (mass >= 0)).all() or not mass.sum() > 0:
        raise ValueError(f"masses {masses}, expected finite numbers >= 0, not all 0; is anything stored yet?")
    edges = mass.cumsum()
    places = np.floor(B * (edges / edges[-1]) + rng.random()).astype(np.int64)
    return np.diff(np.minimum(places, B), prepend=0)


def merge(batches: Sequence[Batch], out: Batch | None = None) -> Batch:
    """The shards' batches as one, into `out` where given; prioritised weights over their largest."""
    batch = joined(batches, out)
    if batch.keys is not None:
        batch.weight /= batch.weight.max()
    return batch


def shards_of(keys: np.ndarray) -> np.ndarray:
    """The number of the replay (``Replay(shard=...)``) that each key (N,) of a merged batch belongs to."""
    return keys >> SHARD_BITS
