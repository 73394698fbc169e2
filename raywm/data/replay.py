"""Sequences from a live store: by which law they are drawn, and the one copy that brings each into a batch."""

from __future__ import annotations

import difflib
import os
import warnings
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from raywm.data.batch import Batch, blank
from raywm.data.episode import OBS
from raywm.data.index import Index
from raywm.data.latents import Latents
from raywm.data.readahead import ReadAhead
from raywm.data.segment import DamagedError
from raywm.data.sumtree import SumTree
from raywm.spaces import ActionCodec

MODES = ("steps", "episodes", "recent", "prioritized")
TAIL, OPEN = 64, 1024  # what a mark names: the last episodes that completed, and the newest that had not
SHARD_BITS = 44  # a key's low bits are the row's, the others its replay's number
SHARED_BYTES = 1 << 20  # from which it pays to wake another thread for half of the copying
_HELPER = ThreadPoolExecutor(1, "raywm-replay-copy")


def _after_fork() -> None:
    global _HELPER
    _HELPER = ThreadPoolExecutor(1, "raywm-replay-copy")  # a child has not the thread of its parent's


os.register_at_fork(after_in_child=_after_fork)
EPSILON = 1e-6  # added to priorities, so that a sequence with none can be drawn again (Schaul et al., section 3.3)

Part = tuple[Mapping[str, np.ndarray], int, int]  # columns of a block, a piece's first row in them, its rows


class Store(Protocol):
    """What a replay needs of an episode store; ``EpisodeStore`` has it."""

    lock: AbstractContextManager

    def parts(self, id: str, complete: bool = True) -> Sequence[Part]:
        """Where an episode's pieces lie. Raises KeyError or DamagedError."""

    def watch(self, listener: Any) -> None:
        """Tell listener.added(id, rows, last) of every piece, at once of those here, and listener.dropped(id)."""


class Replay:
    """Draws sequences from what a store holds and will hold, the parts of incomplete episodes with the rest.

    Args:
        store: an ``EpisodeStore``; the replay follows what is added to it and evicted.
        codec: encodes actions.
        mode: the law by which a row is drawn:
            "steps": uniform over rows; "episodes": uniform over episodes, then over an episode's rows;
            "recent": a row's weight halves with every `half_life` rows collected since;
            "prioritized": in proportion to priority ** alpha, new rows having the largest priority so far
            (Schaul et al. 2015, arXiv 1511.05952), with Batch.keys for ``update`` and the importance weights
            (N p) ** -beta, over their largest in the batch, in Batch.weight.
        cross: False: a window lies in one episode: the drawn row is its middle ("prioritized": its first), moved
            until the window fits, so that the first and last rows of episodes are seen as often as others; shorter
            episodes are padded (mask False). True: the drawn row is the first; the window goes on over an episode's
            end into the one that began after it, whose row is_first, and is moved back from the newest row. An
            incomplete episode that a window leaves is cut there: its row is_last in the batch, as one truncated.
        held_out: share of the episodes, by a stable hash of their ids, that only ``sample(held=True)`` sees.
        ends: share of the sequences that are windows with the last row of a complete episode, uniform over those,
            whatever the mode; as their number is chosen, importance weights leave them alone (1, as of uniform rows).
        half_life: in rows of this replay; for "recent" only.
        context: rows in front of each sequence of a training batch that only bring a model into its state. Above 0,
            ``write`` keeps what the model knows after rows, in memory and for as long as the rows are here, and batches
            come with what it last knew after their last row of context (Batch.stored, Batch.known) and with the names
            of their rows (Batch.rows). Nothing of that outlives this object.
        include_incomplete: whether episodes can be sampled before their end has arrived.
        until: a ``mark`` from a checkpoint: of what the store holds now, what came later is set aside, and not sampled
            until ``release``. What arrives from now on is sampled.
        aside: instead of a mark, ids of episodes to be set aside: the ``aside`` of a replay that this one follows.
        shard: number of this replay among several, which its keys carry, below 2**19. One that is made again should
            have another: what comes for the keys of the one before is then passed over.

    Raises ValueError for arguments that make no sense. Safe to use from several threads.
    """

    def __init__(
        self,
        store: Store,
        codec: ActionCodec,
        mode: str = "steps",
        cross: bool = False,
        held_out: float = 0.0,
        ends: float = 0.0,
        half_life: float | None = None,
        context: int = 0,
        alpha: float = 0.6,
        beta: float = 0.4,
        include_incomplete: bool = True,
        until: Mapping[str, Any] | None = None,
        aside: Iterable[str] = (),
        shard: int = 0,
    ):
        if mode not in MODES:
            near = difflib.get_close_matches(str(mode), MODES, 1)
            raise ValueError(
                f"mode {mode!r}, expected one of {MODES}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if (half_life is not None) != (mode == "recent") or (half_life is not None and not half_life > 0):
            raise ValueError(f"half_life={half_life} with mode {mode!r}; expected rows > 0 with 'recent', else none")
        for name, value in {"held_out": held_out, "ends": ends, "alpha": alpha, "beta": beta}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}, expected a number in [0, 1]")
        if context < 0:
            raise ValueError(f"context={context}, expected rows >= 0")
        self.store, self.codec, self.mode, self.cross, self.shard = store, codec, mode, cross, shard
        self.context = context
        self.held_out, self.ends, self.half_life = held_out, ends, half_life
        self.alpha, self.beta, self.include_incomplete = alpha, beta, include_incomplete
        self._train, self._held = Index(), Index()
        self._tree = SumTree(4096) if mode == "prioritized" else None  # over the keys of _train, modulo its size
        self._latents = Latents() if context else None  # of the rows of _train
        self._top = 1.0  # the largest priority ** alpha so far
        self._open: dict[str, int] = {}  # rows of incomplete episodes, as they began
        self._steps = 0  # transitions that have arrived
        self._tail: deque[str] = deque(maxlen=TAIL)  # the last that completed
        # pieces of what came after the mark
        self._aside: dict[str, list[tuple[int, int, bool]]] = {id: [] for id in aside}
        self._backlog: list[tuple[str, int, bool]] | None = None  # what is there already, while a mark is looked up
        self._ahead = ReadAhead()
        with store.lock:
            if until is None:
                store.watch(self)
            else:
                self._resume(until)

    # What the store says, while it holds its lock

    def added(self, id: str, rows: int, last: bool) -> None:
        """A piece has arrived."""
        if self._backlog is not None:
            self._backlog.append((id, rows, last))
        elif rows:
            whole = self._note(id, rows, last)
            if id in self._aside:  # the rest of what is set aside
                self._aside[id].append((rows, whole, last))
            else:
                self._serve(id, rows, whole, last)

    def _note(self, id: str, rows: int, last: bool) -> int:
        """Keep the mark up to date. Returns the episode's rows by now."""
        whole = self._open.get(id, 0) + rows
        self._steps += rows - (whole == rows)  # an episode's first row is none
        if last:
            self._open.pop(id, None)
            self._tail.append(id)
        else:
            self._open[id] = whole
        return whole

    def _serve(self, id: str, rows: int, whole: int, last: bool) -> None:
        if not self.include_incomplete:
            if not last:
                return
            rows = whole
        side = self._side(id)
        key = side.add(id, rows, last)
        if self._latents is not None and side is self._train:
            self._latents.added(key, rows)
        if self._tree is not None and side is self._train:
            if side.collected - side.oldest > self._tree.size:
                keys, old = np.arange(side.oldest, key), self._tree
                self._tree = SumTree(2 * (side.collected - side.oldest))
                self._tree.set(keys % self._tree.size, old[keys % old.size])
            self._tree.set(np.arange(key, key + rows) % self._tree.size, self._top)

    def dropped(self, id: str) -> None:
        """An episode is no longer here: evicted, damaged, or begun again."""
        self._open.pop(id, None)
        self._aside.pop(id, None)
        if id in self._tail:
            self._tail.remove(id)
        side = self._side(id)
        for key, rows in side.drop(id):
            if self._tree is not None and side is self._train:
                self._tree.set(np.arange(key, key + rows) % self._tree.size, 0)
            if self._latents is not None and side is self._train:
                self._latents.dropped(key, rows)

    def _side(self, id: str) -> Index:
        held = self.held_out > 0 and zlib.crc32(id.encode()) / 2**32 < self.held_out
        return self._held if held else self._train

    # Resuming

    @property
    def mark(self) -> dict[str, Any]:
        """JSON that tells what has arrived by now, for ``until`` when the store is opened again."""
        with self.store.lock:
            open_rows = dict(list(self._open.items())[-OPEN:])
            return {"tail": list(self._tail), "open": open_rows, "steps": self._steps}

    @property
    def aside_steps(self) -> int:
        """Transitions that are set aside as later than ``until``."""
        with self.store.lock:
            pieces = [piece for pieces in self._aside.values() for piece in pieces]
            return sum(rows - (whole == rows) for rows, whole, _ in pieces)

    @property
    def aside(self) -> list[str]:
        """Ids of the episodes that are set aside."""
        with self.store.lock:
            return list(self._aside)

    def _resume(self, until: Mapping[str, Any]) -> None:
        self._backlog = []
        self.store.watch(self)
        backlog, self._backlog = self._backlog, None
        past = _past([id for id, _, last in backlog if last], until["tail"])
        if until["tail"] and backlog and not past:
            warnings.warn(
                f"none of the last {len(until['tail'])} episodes before the checkpoint can be placed among "
                "what is stored (lost or evicted): all of it counts as later; Replay.release() lets it be sampled",
                stacklevel=4,
            )
        rows_by: dict[str, int] = {}
        for id, rows, last in backlog:
            rows_by[id] = rows_by.get(id, 0) + rows
            if id not in past and rows_by[id] > until["open"].get(id, 0):
                self._aside.setdefault(id, [])
            self.added(id, rows, last)

    def release(self) -> None:
        """Let what was set aside as later than ``until`` be sampled."""
        with self.store.lock:
            aside, self._aside = self._aside, {}
            for id, pieces in aside.items():
                for rows, whole, last in pieces:
                    self._serve(id, rows, whole, last)

    # What it holds

    def __len__(self) -> int:
        """Rows that training draws from."""
        return self._train.rows

    @property
    def held_rows(self) -> int:
        """Rows of the held-out episodes."""
        return self._held.rows

    @property
    def episodes(self) -> int:
        """Episodes that training draws from."""
        return len(self._train)

    @property
    def latent_bytes(self) -> int:
        """Memory of what ``write`` keeps."""
        with self.store.lock:
            return 0 if self._latents is None else self._latents.nbytes

    @property
    def mass(self) -> float:
        """What this replay weighs against others of its kind, for ``raywm.data.shards.allot``."""
        if self._tree is not None:
            return self._tree.total
        if self.half_life is not None:
            return self.half_life * -np.expm1(-np.log(2) / self.half_life * len(self))
        return float(self.episodes if self.mode == "episodes" else len(self))

    # Sampling

    def sample(
        self,
        B: int,
        T: int,
        rng: np.random.Generator,
        out: Batch | None = None,
        held: bool = False,
        density: float | None = None,
    ) -> Batch:
        """B sequences of T rows, into `out`'s tensors where given (a batch of this method, of the same shapes).

        `held`: of the held-out episodes instead (uniform over rows where training is prioritized). `density`: rows
        over mass of all shards, see ``raywm.data.shards``; weights are then not divided by their largest. Raises
        ValueError where nothing is stored, or with ``cross`` fewer than T rows. Damaged episodes are passed over.
        """
        if B < 1 or T < 1:
            raise ValueError(f"asked for {B} sequences of {T} rows, expected at least 1 of each")
        if T <= self.context and not held:
            raise ValueError(f"asked for sequences of {T} rows, expected more than the {self.context} of context")
        rows = states = None
        while True:
            with self.store.lock:
                spans, keys, weight = self._draw(self._held if held else self._train, B, T, rng, density)
                parts = []
                for span in spans:
                    try:
                        parts.append(self.store.parts(span.id, complete=False))
                    except (DamagedError, KeyError):
                        self.dropped(span.id)  # if the store has not told so
                        break
                if len(parts) == len(spans):
                    if self._latents is not None and not held:
                        rows, states = self._latest(self._latents, spans, B, T)
                    break
        if out is None:
            like = {
                n[len(OBS) :]: (c.shape[1:], _TORCH[c.dtype]) for n, c in parts[0][0][0].items() if n.startswith(OBS)
            }
            out = blank(B, T, like, self.codec.dim)
        if out.action.shape != (B, T, self.codec.dim):
            raise ValueError(f"out.action is {tuple(out.action.shape)}, expected {(B, T, self.codec.dim)}")
        to = out.flat()
        self._fill(to, T, spans, parts)
        to["weight"][...] = 1 if weight is None else weight
        out.keys, out.ids, out.rows = keys, [span.id for span in spans if span.at % T == 0], rows
        out.stored = {n: torch.from_numpy(array) for n, array in states[0].items()} if states else None
        out.known = torch.from_numpy(states[1]) if states else None
        return out

    def _draw(
        self, side: Index, B: int, T: int, rng: np.random.Generator, density: float | None
    ) -> tuple[list[Span], np.ndarray | None, np.ndarray | None]:
        """What to copy, and the keys (B,) and weights (B,) of the sequences, if the mode has any."""
        if not side.rows or (self.cross and side.rows < T):
            what, least = "training" if side is self._train else "held-out", T if self.cross else 1
            raise ValueError(
                f"there are {side.rows} {what} rows in {len(side)} episodes, expected at least {least}; "
                "collect more before sampling"
            )
        compactions = -1
        while compactions != side.compactions:  # once, but for a draw that had to compact: slots drawn before are void
            compactions = side.compactions
            ends = side.draw_ends(int(self.ends * B + rng.random()), rng) if self.ends else np.zeros(0, np.int64)
            slots, rows, leaves = self._rows(side, B - len(ends), T, rng)
        if len(ends):
            back = rng.integers(T, size=len(ends)) if self.cross else T - 1  # rows before the last one
            slots = np.concatenate([ends, slots])
            rows = np.concatenate([side.episodes["rows"][ends] - 1 - back, rows])
        spans = []
        for b, (slot, row, whole) in enumerate(
            zip(slots.tolist(), rows.tolist(), side.episodes["rows"][slots].tolist())
        ):
            if self.cross and max(row, 0) + T > whole:
                spans += self._crossing(side, slot, max(row, 0), T, b * T)
                continue
            row = max(min(row, whole - T), 0)  # moved until it fits
            n = min(T, whole - row)
            ended = row + n == whole and bool(side.episodes["complete"][slot])
            spans.append(Span(side.ids[slot], row, n, b * T, ended, False))
        if leaves is None:
            return spans, None, None
        firsts = [side.key(side.slots[span.id], span.row) for span in spans if span.at % T == 0][: len(ends)]
        return spans, *self._weighed(leaves, firsts, density)

    def _crossing(self, side: Index, first: int, start: int, T: int, at: int) -> list[Span]:
        spans, stop = [], at + T
        for slot, row, n in side.spans(first, start, T):
            ended = row + n == side.episodes["rows"][slot] and bool(side.episodes["complete"][slot])
            spans.append(Span(side.ids[slot], row, n, at, ended, not ended and at + n < stop))
            at += n
        return spans

    def _rows(
        self, side: Index, n: int, T: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(slot, first row) of n windows by the mode's law, before they are moved to where they fit; and the leaves."""
        if self._tree is not None and side is self._train:
            leaves = self._tree.draw(n, rng)
            return *side.find(self._keys(leaves)), leaves
        if self.mode == "episodes":
            slot = side.draw_episodes(n, rng)
            row = rng.integers(side.episodes["rows"][slot])
        elif self.half_life is not None:
            # the inverse of 1 - exp(-rate * age), the share of the weight that is newer, cut at the oldest row
            rate = np.log(2) / self.half_life
            slot, row = side.draw_rows(
                lambda n, N: np.minimum(-np.log1p(rng.random(n) * np.expm1(-rate * N)) / rate, N - 1).astype(np.int64),
                n,
            )
        else:
            slot, row = side.draw_rows(lambda n, N: (rng.random(n) * N).astype(np.int64), n)
        return slot, row if self.cross else row - T // 2, None

    def _keys(self, leaves: np.ndarray) -> np.ndarray:
        """The keys of the rows that have these leaves: of all that share one, the only one that may be here."""
        assert self._tree is not None
        return self._train.oldest + (leaves - self._train.oldest) % self._tree.size

    def _weighed(self, leaves: np.ndarray, firsts: list[int], density: float | None) -> tuple[np.ndarray, np.ndarray]:
        """Keys and importance weights: of windows with ends (`firsts`: their first rows' keys), then of the others."""
        assert self._tree is not None
        weight = np.ones(len(firsts) + len(leaves))
        # N p = N * priority / total
        per_mass = len(self) / self._tree.total if density is None else density
        weight[len(firsts) :] = (per_mass * self._tree[leaves].astype(np.float64)) ** -self.beta
        if density is None:
            weight /= weight.max()
        keys = np.concatenate([np.array(firsts, np.int64), self._keys(leaves)])
        return keys | self.shard << SHARD_BITS, weight

    def _fill(
        self, to: Mapping[str, np.ndarray], T: int, spans: Sequence[Span], parts: Sequence[Sequence[Part]]
    ) -> None:
        """Copy the spans into a batch's arrays (``Batch.flat``): all but the weights."""
        pieces, reward = list(_pieces(spans, parts)), to["reward"]
        action = np.empty((len(reward), *self.codec.shape), self.codec.dtype)
        images = {name: column for name, column in to.items() if name.startswith(OBS)}
        if self._ahead.cold:
            for columns, source, _ in pieces:
                for name in images:
                    self._ahead.ask(columns[name][source])
        before = self._ahead.count()
        # The flags follow from where a row is in its episode, as ``validate`` held them to: not read, but one.
        for name in ("is_first", "is_last", "is_terminal"):
            to[name].fill(False)
        to["mask"].fill(True)
        zero: list[int | slice] = []  # where the action is zero
        for (_, row, n, at, ended, cut), lies in zip(spans, parts):
            end = at + n
            if row == 0:
                to["is_first"][at] = True
                zero.append(at)
            if ended:
                columns, start, rows = lies[-1]
                to["is_last"][end - 1] = True
                to["is_terminal"][end - 1] = columns["is_terminal"][start + rows - 1]
            elif cut:
                to["is_last"][end - 1] = True
            if n < T and not self.cross:
                padding = slice(end, at + T)
                for column in (*images.values(), reward, to["mask"]):
                    column[padding] = 0
                action[padding] = self.codec.zero()
                zero.append(padding)
        for columns, source, place in pieces:
            action[place] = columns["action"][source]
            reward[place] = columns["reward"][source]
        self.codec.encode(action, out=to["action"])  # (B*T,*shape) -> (B*T,A)
        for where in zero:
            to["action"][where] = 0
        # last: they drive all else out of the caches
        copies = [(to[n], place, columns[n], source) for columns, source, place in pieces for n in images]
        if sum(column[place].nbytes for column, place, *_ in copies[:1]) * len(copies) < SHARED_BYTES:
            _copy(copies)
        else:  # numpy copies without the interpreter's lock: another core takes half
            other = _HELPER.submit(_copy, copies[::2])
            _copy(copies[1::2])
            other.result()
        self._ahead.copied(before)

    # What the model knows

    def _latest(
        self, latents: Latents, spans: Sequence[Span], B: int, T: int
    ) -> tuple[np.ndarray, tuple[dict[str, np.ndarray], np.ndarray] | None]:
        """The keys (B, T) of a batch's rows, and what is stored of the last rows of its context, if anything."""
        side, flat = self._train, np.full(B * T, -1)
        for id, row, n, at, *_ in spans:
            flat[at : at + n] = side.keys(side.slots[id], row, n)
        keys = flat.reshape(B, T)
        stored, known = latents.read(keys[:, self.context - 1])
        keys[keys >= 0] |= self.shard << SHARD_BITS
        return keys, (stored, known) if stored else None

    def write(self, keys: np.ndarray, states: Mapping[str, np.ndarray]) -> None:
        """Keep what a model knows after rows (N,) of batches (``Batch.rows``): arrays (N, *), always of the same names,
        row shapes and dtypes.

        Keys of padding, of other shards and of rows that are no longer here are passed over. Raises ValueError for
        arrays of another layout, and where the replay has no ``context``.
        """
        if self._latents is None:
            raise ValueError("this replay has context=0, expected at least 1 row; Replay(..., context=1) keeps states")
        if keys.ndim != 1:
            raise ValueError(f"keys {keys.shape}, expected (N,); flatten those of a batch as its states are")
        row = keys & (1 << SHARD_BITS) - 1
        with self.store.lock:
            ours = (keys >> SHARD_BITS == self.shard) & (row < self._train.collected)
            if not ours.all():
                row, states = row[ours], {name: array[ours] for name, array in states.items()}
            self._latents.write(row, states)

    # Priorities

    def update(self, keys: np.ndarray, priorities: np.ndarray) -> None:
        """Give the sequences of a batch (``Batch.keys``) their priorities (N,): |TD error| or the model's loss.

        Keys of other shards and of rows that are no longer here are passed over. Raises ValueError for a priority that
        is negative or not finite, and where the mode is not "prioritized".
        """
        if self._tree is None:
            raise ValueError(f"mode is {self.mode!r}, which has no priorities; Replay(..., mode='prioritized') has")
        keys, new = np.asarray(keys, np.int64), np.asarray(priorities, np.float64)
        if keys.shape != new.shape or keys.ndim != 1:
            raise ValueError(f"{keys.shape} keys and {new.shape} priorities, expected (N,) of both")
        if not (np.isfinite(new) & (new >= 0)).all():
            raise ValueError(f"priorities range from {new.min()} to {new.max()}, expected finite numbers >= 0")
        ours = keys >> SHARD_BITS == self.shard
        new, keys = (new[ours] + EPSILON) ** self.alpha, keys[ours] & (1 << SHARD_BITS) - 1
        with self.store.lock:
            here = (keys >= self._train.oldest) & (keys < self._train.collected)
            keys, new = keys[here] % self._tree.size, new[here]
            here = self._tree[keys] > 0
            self._tree.set(keys[here], new[here])
            self._top = max(self._top, float(new.max(initial=0)))


def _copy(copies: Sequence[tuple[np.ndarray, slice, np.ndarray, slice]]) -> None:
    for to, place, column, source in copies:
        to[place] = column[source]


class Span(NamedTuple):
    """Rows of one episode that are to be copied."""

    id: str
    row: int  # the first, in the episode
    n: int
    at: int  # where it goes, in the batch's B*T rows
    ended: bool  # whether it ends with a complete episode's last row
    cut: bool  # whether the window leaves the episode, whose end has not come


def _pieces(
    spans: Sequence[Span], parts: Sequence[Sequence[Part]]
) -> Iterator[tuple[Mapping[str, np.ndarray], slice, slice]]:
    """(columns of a block, rows in them, where they go): one for each piece of an episode that a span touches."""
    for (_, row, n, at, *_), lies in zip(spans, parts):
        for columns, start, rows in lies:
            if row >= rows:
                row -= rows
                continue
            m = min(n, rows - row)
            yield columns, slice(start + row, start + row + m), slice(at, at + m)
            at, row, n = at + m, 0, n - m
            if not n:
                break


def _past(completed: list[str], tail: Sequence[str]) -> set[str]:
    """The episodes that had completed by a mark, of all in the order of completion; `tail`: the last that had.

    The tail is a run of completions, of which some may be gone. One of it that lies apart was damaged and has been
    collected again since. Eviction goes by age: where the tail's beginning is gone, so is all that came before it.
    """
    known = set(tail)
    first = next((i for i, id in enumerate(completed) if id in known), len(completed))
    stop = next((i for i in range(first, len(completed)) if completed[i] not in known), len(completed))
    return set(completed[:stop]) if stop > first and (first == 0 or 2 * (stop - first) >= len(known)) else set()


_TORCH = {np.dtype(np.uint8): torch.uint8, np.dtype(np.float32): torch.float32}
