"""Which rows a replay may draw, in the order in which they arrived: numpy arrays, no row of data."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable

import numpy as np

SPARE = 64  # what may be dead beyond half of everything: small indexes are not compacted at every drop


class Table:
    """Columns of int64 with amortised append."""

    def __init__(self, *names: str):
        self.size = 0
        self._columns = {name: np.empty(SPARE, np.int64) for name in names}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name][: self.size]

    def append(self, *values: int) -> None:
        n = self.size
        for name, value in zip(self._columns, values):
            column = self._columns[name]
            if n == len(column):
                column = self._columns[name] = np.concatenate([column, np.empty(n, np.int64)])
            column[n] = value
        self.size = n + 1

    def keep(self, mask: np.ndarray) -> None:
        """Only the entries of the mask (size,), in memory for them."""
        self._columns = {name: np.concatenate([self[name][mask], np.empty(SPARE, np.int64)]) for name in self._columns}
        self.size = int(mask.sum())


class Index:
    """Episodes as their pieces arrive. An episode is named by its slot (which changes when the index is compacted, in
    ``add``, ``drop`` and the draws), a row by its slot and its number in the episode, or for good by its key: how many
    rows came before it.

    Dropping marks, draws pass over what is marked, and what is marked is taken out once it is as much as what lives:
    every operation is O(1) on average, but for the search of a row among the pieces (O(log)).
    """

    def __init__(self) -> None:
        # end: place after its last row among all that are indexed; first: its first row in the episode, and shift: what
        # leads from a place to a row of the episode
        self.pieces = Table("end", "key", "first", "shift", "rows", "slot")
        self.episodes = Table("rows", "complete")  # rows: 0 when dropped
        self._of: list[tuple[array, array]] = []  # by slot: keys and firsts of an episode's pieces
        self.ends = Table("slot")  # of complete episodes, as they completed
        self.ids: list[str] = []  # by slot
        self.slots: dict[str, int] = {}
        self.rows = 0
        self.collected = 0  # rows ever: the next key
        self._head_piece = self._head_slot = self._head_end = 0  # before them all is dropped
        self._dead_pieces = 0
        self.compactions = 0
        self._base = self._end = 0  # places in use: from the first piece that is here to the last one

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def oldest(self) -> int:
        """The first key that may still be here."""
        return int(self.pieces["key"][self._head_piece]) if self.rows else self.collected

    @property
    def newest_slot(self) -> int:
        return self.episodes.size - 1

    def add(self, id: str, rows: int, last: bool) -> int:
        """The next piece of an episode, or its first one. Returns the key of its first row."""
        slot = self.slots.get(id)
        if slot is None:
            slot = self.slots[id] = self.episodes.size
            self.ids.append(id)
            self._of.append((array("q"), array("q")))
            self.episodes.append(0, 0)
        first, key = int(self.episodes["rows"][slot]), self.collected
        self.pieces.append(self._end + rows, key, first, first - self._end, rows, slot)
        self._end += rows
        self.episodes["rows"][slot] = first + rows
        keys, firsts = self._of[slot]
        keys.append(key)
        firsts.append(first)
        if last:
            self.episodes["complete"][slot] = 1
            self.ends.append(slot)
        self.rows += rows
        self.collected += rows
        return key

    def drop(self, id: str) -> list[tuple[int, int]]:
        """Take an episode out. Returns its (key, rows), piece by piece."""
        slot = self.slots.pop(id, None)
        if slot is None:
            return []
        (keys, firsts), rows = self._of[slot], int(self.episodes["rows"][slot])
        gone = [(key, stop - first) for key, first, stop in zip(keys, firsts, [*firsts[1:], rows])]
        self.rows -= rows
        self.episodes["rows"][slot], self._of[slot] = 0, (array("q"), array("q"))
        self._dead_pieces += len(gone)
        self._advance()
        if (
            self._end - self._base > 2 * self.rows + SPARE
            or self._dead_pieces > self.pieces.size // 2 + SPARE
            or self.episodes.size > 2 * len(self) + SPARE
        ):
            self.compact()
        return gone

    def _advance(self) -> None:
        alive, slots, ends = self.episodes["rows"], self.pieces["slot"], self.ends["slot"]
        while self._head_piece < len(slots) and not alive[slots[self._head_piece]]:
            self._head_piece += 1
        while self._head_slot < len(alive) and not alive[self._head_slot]:
            self._head_slot += 1
        while self._head_end < len(ends) and not alive[ends[self._head_end]]:
            self._head_end += 1
        self._base = int(self.pieces["end"][self._head_piece - 1]) if self._head_piece else 0

    def compact(self) -> None:
        """Forget what is dropped; slots change."""
        self.compactions += 1
        alive = self.episodes["rows"] > 0
        slot = np.cumsum(alive) - 1  # old slot -> new slot
        for table in (self.pieces, self.ends):
            table.keep(alive[table["slot"]])
            table["slot"][:] = slot[table["slot"]]
        self.pieces["end"][:] = np.cumsum(self.pieces["rows"])
        self.pieces["shift"][:] = self.pieces["first"] + self.pieces["rows"] - self.pieces["end"]
        self._base, self._end = 0, self.rows
        kept = np.flatnonzero(alive).tolist()
        self.ids, self._of = [self.ids[i] for i in kept], [self._of[i] for i in kept]
        self.slots = {id: i for i, id in enumerate(self.ids)}
        self.episodes.keep(alive)
        self._head_piece = self._head_slot = self._head_end = self._dead_pieces = 0

    # Draws

    # (A replay's time beside its copies goes into the first call of whatever the copies drove out of the caches:
    # methods of arrays rather than functions of numpy, and ``random`` rather than ``integers``, are a third of it.)

    def draw_rows(self, ages: Callable[[int, int], np.ndarray], B: int) -> tuple[np.ndarray, np.ndarray]:
        """(slot, row) of B rows: ages(n, N) gives n integers in [0, N), 0 being the newest of N indexed rows."""

        def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
            place = self._end - 1 - ages(n, self._end - self._base)
            piece = self.pieces["end"].searchsorted(place, "right")
            return self.pieces["slot"][piece], place + self.pieces["shift"][piece]

        if self._end - self._base == self.rows:
            return draw(B)
        return self._alive(draw, B)

    def draw_episodes(self, B: int, rng: np.random.Generator) -> np.ndarray:
        """Slots (B,), uniform over episodes."""

        def draw(n: int) -> tuple[np.ndarray]:
            return (rng.integers(self._head_slot, self.episodes.size, size=n),)

        return self._alive(draw, B)[0]

    def draw_ends(self, B: int, rng: np.random.Generator) -> np.ndarray:
        """Slots (B,), uniform over complete episodes; none if there is none."""

        def draw(n: int) -> tuple[np.ndarray]:
            return (self.ends["slot"][rng.integers(self._head_end, self.ends.size, size=n)],)

        return self._alive(draw, B)[0] if self._head_end < self.ends.size else np.zeros(0, np.int64)

    def _alive(self, draw: Callable, B: int) -> tuple:
        """What draw(B) gives, its dropped episodes drawn again."""
        drawn, attempts = draw(B), 0
        while len(dead := np.flatnonzero(self.episodes["rows"][drawn[0]] == 0)):
            attempts += 1
            if attempts % 8 == 0:  # a law that sees little else than what is dropped: take that out
                self.compact()
                drawn = draw(B)
                continue
            for all_of, again in zip(drawn, draw(len(dead))):
                all_of[dead] = again
        return drawn

    # Keys

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(slot, row) of keys that are here."""
        piece = np.searchsorted(self.pieces["key"], keys, side="right") - 1
        return self.pieces["slot"][piece], self.pieces["first"][piece] + keys - self.pieces["key"][piece]

    def key(self, slot: int, row: int) -> int:
        """The key of a row."""
        keys, firsts = self._of[slot]
        piece = bisect_right(firsts, row) - 1
        return keys[piece] + row - firsts[piece]

    def keys(self, slot: int, row: int, n: int) -> np.ndarray:
        """The keys (n,) of n rows of an episode, from `row` on."""
        keys, firsts = self._of[slot]
        piece, stop = bisect_right(firsts, row) - 1, bisect_left(firsts, row + n)
        out = np.arange(row, row + n)
        if stop == piece + 1:
            return out + (keys[piece] - firsts[piece])
        first = np.array(firsts[piece:stop])
        return out + (np.array(keys[piece:stop]) - first)[first.searchsorted(out, "right") - 1]

    # Windows over the ends of episodes

    def spans(self, slot: int, row: int, T: int) -> list[tuple[int, int, int]]:
        """[(slot, row, rows)] of the T rows from here on, over the ends of episodes into those that began after them;
        where so many did not arrive yet, of the newest T rows. There must be T rows."""
        alive, spans, left = self.episodes["rows"], [], T
        while slot < len(alive):
            n = min(left, int(alive[slot]) - row)
            if n > 0:
                spans.append((slot, row, n))
                left -= n
                if not left:
                    return spans
            slot, row = slot + 1, 0
        spans, left = [], T
        while left:
            slot -= 1
            n = min(left, int(alive[slot]))
            if n:
                spans.append((slot, int(alive[slot]) - n, n))
                left -= n
        return spans[::-1]
