"""Frozen sets of episodes, and the one way in which sequences are drawn and copied into a Batch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from raywm.data.batch import Batch
from raywm.data.episode import FLAGS, Episode
from raywm.spaces import ActionCodec


class Snapshot:
    """A frozen set of whole episodes, ordered by id: the same episodes and generator always give the same batches."""

    def __init__(self, episodes: Sequence[Episode], codec: ActionCodec):
        self.episodes = tuple(sorted(episodes, key=lambda e: e.id))
        self.codec = codec
        self.ids = [e.id for e in self.episodes]
        if len(set(self.ids)) < len(self.ids):
            twice = next(a for a, b in zip(self.ids, self.ids[1:]) if a == b)
            raise ValueError(f"episode {twice!r} is given twice, expected every id once")
        self._ends = np.cumsum([len(e) for e in self.episodes], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.episodes)

    @property
    def rows(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def steps(self) -> int:
        """Transitions: every episode has one less than rows."""
        return self.rows - len(self.episodes)

    def split(self, held: float, least: int = 1) -> tuple[Snapshot, Snapshot]:
        """(train, heldout) by a stable hash of the episode id, so an episode never changes sides as data grows.

        Of two or more episodes both sides get at least one, and at least `least` where there are enough for both:
        the episodes nearest to the border change sides.
        """
        if not 0 <= held <= 1:
            raise ValueError(f"held is {held}, expected a fraction in [0, 1]")
        place = np.array([zlib.crc32(id.encode()) / 2**32 for id in self.ids])
        least = min(max(least, 1), len(self) // 2)
        count = int(np.clip((place < held).sum(), least, len(self) - least))
        out = set(np.argsort(place, kind="stable")[:count].tolist())
        train = [e for i, e in enumerate(self.episodes) if i not in out]
        return Snapshot(train, self.codec), Snapshot([self.episodes[i] for i in out], self.codec)

    def sample(
        self, B: int, T: int, rng: np.random.Generator, obs: Sequence[dict[str, np.ndarray]] | None = None
    ) -> Batch:
        """B sequences of T rows, uniform over steps; sequences of shorter episodes are padded (`mask` False).

        `obs`: columns computed once for each episode (same order as `.episodes`), used instead of the observations.
        """
        if obs is not None and len(obs) != len(self):
            raise ValueError(f"obs has columns for {len(obs)} episodes, expected {len(self)} as .episodes has")
        episode, start = draw(self._ends, B, T, rng)
        picked = [[self.episodes[i]] for i in episode]
        columns = None if obs is None else [obs[i] for i in episode]
        return gather(picked, start, T, self.codec, columns)

    def frames(self, column: str, B: int, rng: np.random.Generator) -> torch.Tensor:
        """B rows of one observation column, uniform over all rows: (B, H, W, C) uint8 for images."""
        if not self.episodes:
            raise ValueError("the snapshot is empty; collect episodes before sampling")
        if column not in self.episodes[0].obs:
            raise ValueError(f"no observation column {column!r}, expected one of {sorted(self.episodes[0].obs)}")
        row = rng.integers(self.rows, size=B)
        episode = np.searchsorted(self._ends, row, side="right")
        first = self.episodes[0].obs[column]
        out = np.empty((B, *first.shape[1:]), first.dtype)
        for b, (i, r) in enumerate(zip(episode, row)):
            out[b] = self.episodes[i].obs[column][r - self._ends[i]]  # counted from the episode's end
        return torch.from_numpy(out)


def draw(ends: np.ndarray, B: int, T: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(episode, start row) of B sequences, from the running total of rows at each episode's end.

    An episode is drawn by its number of rows. The window's start is drawn from [-(T//2), L - T//2) and clipped into
    the episode: so its first and last rows, where resets and terminations are, are seen as often as those inside.
    """
    if len(ends) == 0:
        raise ValueError("there is no complete episode to sample from; collect episodes first")
    if B < 1 or T < 1:
        raise ValueError(f"asked for {B} sequences of {T} rows, expected at least 1 of each")
    row = rng.integers(ends[-1], size=B)
    episode = np.searchsorted(ends, row, side="right")
    length = np.diff(ends, prepend=0)[episode]
    start = rng.integers(-(T // 2), length - T // 2)
    return episode, np.clip(start, 0, np.maximum(0, length - T))


def gather(
    episodes: Sequence[Sequence[Episode]],
    starts: np.ndarray,
    T: int,
    codec: ActionCodec,
    obs: Sequence[dict[str, np.ndarray]] | None = None,
) -> Batch:
    """Copy rows [start, start + T) of B episodes, each a list of consecutive pieces, into one new Batch."""
    B, first = len(episodes), episodes[0][0]
    like = first.obs if obs is None else obs[0]
    columns = {name: np.empty((B, T, *c.shape[1:]), c.dtype) for name, c in like.items()}  # zeroed where padded only
    action = np.broadcast_to(codec.zero(), (B, T, *codec.shape)).copy()
    rest = {name: np.zeros((B, T), bool) for name in (*FLAGS, "mask")} | {"reward": np.zeros((B, T), np.float32)}
    for b, pieces in enumerate(episodes):
        at = 0  # rows already filled
        skip = int(starts[b])
        if obs is not None:
            for name, column in obs[b].items():
                part = column[skip : skip + T]
                columns[name][b, : len(part)] = part
        for piece in pieces:
            n = min(T - at, len(piece) - skip)
            if n <= 0:
                skip -= len(piece)
                continue
            to, source = slice(at, at + n), slice(skip, skip + n)
            if obs is None:
                for name, column in columns.items():
                    column[b, to] = piece.obs[name][source]
            action[b, to] = piece.action[source]
            rest["reward"][b, to] = piece.reward[source]
            for flag in FLAGS:
                rest[flag][b, to] = getattr(piece, flag)[source]
            at, skip = at + n, 0
            if at == T:
                break
        rest["mask"][b, :at] = True
        for column in columns.values():
            column[b, at:] = 0
    encoded = codec.encode(action)  # (B,T,*shape) -> (B,T,A)
    encoded[rest["is_first"] | ~rest["mask"]] = 0
    tensors: dict[str, Any] = {name: torch.from_numpy(values) for name, values in rest.items()}
    ids = [pieces[0].id for pieces in episodes]
    obs_tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    return Batch(obs=obs_tensors, action=torch.from_numpy(encoded), weight=torch.ones(B), ids=ids, **tensors)
