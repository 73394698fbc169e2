"""What the rows of a collector see and do, time by time, until it is copied into blocks. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import gymnasium as gym
import numpy as np

from raywm.data.episode import OBS
from raywm.spaces import ActionCodec

BLOCK_BYTES = 1 << 22  # of a block, where nobody says otherwise: what Ray does for one costs as much as copying some MB


class Recording:
    """Rings over time: the batch that an agent acts on is the place that it is recorded in, without a copy between.

    One array (room, rows, *) a column; time t is its entry t % room, so a time is lost `room` times later: who needs
    it longer calls `grow`. Without `keep` there are only the present observations (and all rewards).

    Attributes: ``time`` of the present; ``now`` {column: (rows, *)} and ``reward`` (rows,) float32, views to write to;
    ``row_bytes`` of one row in a block; ``room``.
    """

    def __init__(self, columns: Mapping[str, gym.spaces.Box], codec: ActionCodec, rows: int, keep: bool = True) -> None:
        self.rows, self.keep, self._zero = rows, keep, codec.zero()
        boxes = {name: (box.shape, np.dtype(box.dtype)) for name, box in columns.items()}
        action = (codec.shape, codec.dtype)
        self.row_bytes = 7 + sum(math.prod(shape) * dtype.itemsize for shape, dtype in (*boxes.values(), action))
        # Two blocks fit in: episodes seldom end together. More than 8192 times of small rows would leave the cache.
        times = 2 * BLOCK_BYTES // (rows * self.row_bytes)
        self.room = 1 << min(13, max(6, times.bit_length()))  # a power of two: % room is & (room - 1)
        kept = self.room if keep else 1
        self._obs = {name: np.zeros((kept, rows, *shape), dtype) for name, (shape, dtype) in boxes.items()}
        self._action = np.zeros((kept, rows, *codec.shape), codec.dtype)
        self._reward = np.zeros((self.room, rows), np.float32)
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self.time = 0
        self._arrange()
        self.clear(slice(None))

    def _arrange(self) -> None:
        self._floats = [column.reshape(len(column), -1) for column in self._obs.values() if column.dtype.kind == "f"]
        self._look()

    def _look(self) -> None:
        at = self.time & (self.room - 1)
        self.reward = self._reward[at]
        seen = at if self.keep else 0
        self.now = {name: column[seen] for name, column in self._obs.items()}
        self._checked = [self.reward, *[column[seen] for column in self._floats]]

    def advance(self, action: np.ndarray) -> None:
        """The next time begins: what is written from now on was arrived at by `action` (rows, *shape)."""
        self.time += 1
        self._look()
        if self.keep:
            self._action[self.time & (self.room - 1)] = action

    def clear(self, rows: int | list[int] | slice) -> None:
        """These rows hold zeros now."""
        self.reward[rows] = 0
        for now in self.now.values():
            now[rows] = 0

    def finite(self) -> bool:
        """Whether all present numbers are finite. Huge ones, whose squares are not, may be called infinite too."""
        # One BLAS call over all rows costs a third of isfinite().all(), and this is asked every vector step.
        for flat in self._checked:
            if not math.isfinite(flat.dot(flat)):
                return False
        return True

    def fault(self, row: int) -> str | None:
        """What of a row's present is not finite, in words."""
        if not math.isfinite(self.reward[row]):
            return f"reward {self.reward[row]}, expected a finite number"
        for name, now in self.now.items():
            if now.dtype.kind == "f" and not np.isfinite(now[row]).all():
                return f"observation {name!r} is {now[row]}, expected finite numbers"
        return None

    def grow(self, oldest: int) -> None:
        """Double the room, keeping the times from `oldest` on."""
        times = np.arange(oldest, self.time + 1)
        was, room = times & (self.room - 1), 2 * self.room

        def move(column: np.ndarray) -> np.ndarray:
            moved = np.zeros((room, *column.shape[1:]), column.dtype)
            moved[times & (room - 1)] = column[was]
            return moved

        if self.keep:
            self._obs = {name: move(column) for name, column in self._obs.items()}
            self._action = move(self._action)
        self._reward = move(self._reward)
        self.room = room
        self._arrange()

    def rewards(self, row: int, begin: int, count: int) -> np.ndarray:
        """(count,) rewards of a row from time `begin` on."""
        return self._reward[np.arange(begin, begin + count) & (self.room - 1), row]

    def gather(
        self,
        row: np.ndarray,
        begin: np.ndarray,
        count: np.ndarray,
        first: np.ndarray,
        last: np.ndarray,
        terminal: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """The rows of P pieces one after another, as columns by stored name and order: one copy a column.

        Args, each (P,): the `row` it was played in; its first time and its `count` of rows, which may be 0; whether it
        begins its episode, ends it, and ends it terminally.
        """
        stop = np.cumsum(count)
        start = stop - count
        total = int(stop[-1]) if len(stop) else 0
        times = np.arange(total) + np.repeat(begin - start, count)
        at = (times & (self.room - 1)) * self.rows + np.repeat(row, count)  # (N,) into (room * rows, *)

        def rows_of(column: np.ndarray) -> np.ndarray:
            return column.reshape(-1, *column.shape[2:]).take(at, axis=0)

        columns = {OBS + name: rows_of(self._obs[name]) for name in sorted(self._obs)}
        columns |= {"action": rows_of(self._action), "reward": rows_of(self._reward)}
        opening = start[first]
        columns["action"][opening] = self._zero
        columns["reward"][opening] = 0
        marked = (("is_first", opening), ("is_last", stop[last] - 1), ("is_terminal", stop[terminal] - 1))
        for flag, where in marked:
            columns[flag] = np.zeros(total, bool)
            columns[flag][where] = True
        return columns
