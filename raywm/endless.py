"""Episodes without an end: a collector that is advanced a few steps at a time. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from raywm.agent import Agent
from raywm.collect import Collector
from raywm.data.episode import to_block
from raywm.playing import Play, Played


class Endless:
    """Plays episodes `first`, `first` + 1, ... in a collector's environments, which stand still between two calls.

    Whatever was stepped is handed over at the end of every call, so that nobody has to wait for an episode's end; what
    a collector that dies takes along is what its running episodes would have become. The numbers are not played in
    order: a row whose episode has ended goes on with the next number n of its own (n % envs is the row).

    Args:
        collector: is this object's alone from now on; agent: who plays first; stream, common: as in
            ``Collector.blocks``.
    """

    def __init__(
        self,
        collector: Collector,
        agent: Agent,
        first: int,
        stream: str = "collect",
        common: dict[str, Any] | None = None,
    ) -> None:
        envs = collector.envs
        self.collector, self.common = collector, common
        self._numbers = [first + (row - first) % envs for row in range(envs)]  # the next one of each row
        collector.offers.clear()
        self._play = Play(collector, agent, self._numbers, stream, pickup=1)
        self._numbers = [number + envs for number in self._numbers]

    def offer(self, agent: Agent) -> None:
        """A new object: it acts for all rows from the next step on, with their states if it is of the same type."""
        self.collector.offer(agent)

    def advance(self, steps: int) -> Iterator[tuple[pa.Table, list[Played], int]]:
        """Take `steps` vector steps; yields blocks of what was seen, the episodes that ended in each, its transitions.

        A row takes a step, or begins its next episode. Raises ValueError as ``Collector.blocks`` does.
        """
        play = self._play
        for row, queue in enumerate(play.waiting):
            while len(queue) < steps // 2 + 2:  # an episode is a beginning and a step at least
                queue.append(self._numbers[row])
                self._numbers[row] += self.collector.envs
        for _ in range(steps):
            if play.full:
                yield from self._flush()
                play.make_room()
            play.step()
        yield from self._flush()

    def _flush(self) -> Iterator[tuple[pa.Table, list[Played], int]]:
        play = self._play
        play.flush()
        if not play.pieces:
            return
        pieces, columns = play.take(play.rows)
        steps = sum(piece.rows - (piece.begin == piece.episode.begin) for piece in pieces if piece.rows)
        table = to_block(columns, [piece.header() for piece in pieces], self.common)
        yield table, [piece.played() for piece in pieces if piece.ended], steps
