"""Playing episodes in real environments: many at once in one process, the same bits however they are shared out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raywm.agent import Agent
from raywm.config import EnvConfig
from raywm.data.episode import Episode, cut, to_block
from raywm.envs.make import make_env
from raywm.playing import Piece, Play, Played, Row
from raywm.recording import BLOCK_BYTES, Recording
from raywm.spaces import ActionCodec, obs_columns

__all__ = ["BLOCK_S", "Collector", "Played"]

BLOCK_S = 0.25  # seconds after which finished episodes are handed over, however few


class Collector:
    """Plays numbered episodes in `envs` environments at once.

    Episode n is always played in row n % envs, its environment and its agent seeded by (seed, stream, n), and the agent
    acts on a batch of always `envs` rows (idle ones hold zeros): so an episode has the same bits whichever collector
    plays it and whatever is played beside it. An episode longer than `max_steps` is an error, not a hang.

    An environment that raises, or gives a NaN or a wrong shape, is closed, made anew and counted in `restarts`. Its
    episode is tried once more from its seed; when it breaks again it is counted in `broken` and kept out of the data.
    When more than three and more than a tenth of this collector's episodes broke, that is a ValueError, naming
    environment, episode and step.
    """

    def __init__(self, env: EnvConfig | Mapping[str, Any], seed: int, envs: int = 8, max_steps: int = 100_000) -> None:
        if envs < 1:
            raise ValueError(f"envs is {envs}, expected at least 1")
        self.config, self.seed, self.envs, self.max_steps = env, seed, envs, max_steps
        self.id: str = env["id"] if isinstance(env, Mapping) else env.id
        self.restarts = self.broken = self.played = 0
        self._rows: dict[int, Row] = {}
        self._recordings: dict[bool, Recording] = {}
        self._turn = 0
        self.offers: deque[Agent] = deque(maxlen=1)
        self.steps = 0  # vector steps
        self.busy: Row | None = None  # whose environment is being called
        self._watched: tuple[Any, float] = (None, 0.0)
        first = self.row(0).env
        self.columns = obs_columns(first.observation_space)
        self.codec = ActionCodec(first.action_space)

    def blocks(
        self,
        agent: Agent,
        numbers: Sequence[int],
        stream: str = "collect",
        *,
        common: dict[str, Any] | None = None,
        block_bytes: int = BLOCK_BYTES,
        block_s: float = BLOCK_S,
        piece_rows: int | None = None,
        pickup: Literal["episode"] | int = "episode",
    ) -> Iterator[tuple[pa.Table, list[Played]]]:
        """Play the episodes `numbers`; yield what has ended as blocks (``to_block``) and as Played.

        A block is handed over when it holds `block_bytes`, or `block_s` seconds after the last one, or at the end; it
        is larger than `block_bytes` by less than one episode.
        With `piece_rows` an episode that is still running hands over its rows in pieces of that many, and Played comes
        with the last. A broken episode is a piece without rows whose info says "broken": that voids its other pieces.
        An episode that is tried again begins again with its first row.

        `pickup` says when an agent that was offered meanwhile takes over: "episode": it plays the episodes that begin
        from then on, and the others end as they began; a number k: it takes over all rows at every k-th vector step.

        Raises ValueError when too many episodes broke, or one does not end.
        """
        for what, least in (("piece_rows", piece_rows), ("pickup", None if pickup == "episode" else pickup)):
            if least is not None and least < 1:
                raise ValueError(f"{what} is {least}, expected at least 1")
        play = Play(self, agent, numbers, stream, pickup=pickup, piece_rows=piece_rows)
        most, handed = max(1, block_bytes // play.recording.row_bytes), time.monotonic()

        def due() -> bool:
            return play.rows >= most or time.monotonic() - handed >= block_s

        for pieces, columns in self._run(play, due, most):
            handed = time.monotonic()
            yield to_block(columns, [p.header() for p in pieces], common), [p.played() for p in pieces if p.ended]

    def collect(self, agent: Agent, numbers: Sequence[int], stream: str = "collect") -> Iterator[Episode]:
        """Play the episodes `numbers` and yield each as it ends; those that broke are left out.

        Raises ValueError when too many broke, or one does not end.
        """
        for pieces, columns in self._run(Play(self, agent, numbers, stream), lambda: True):
            stop = 0
            for piece in pieces:
                start, stop = stop, stop + piece.rows
                if piece.rows:
                    yield cut(columns, piece.episode.id, start, stop, piece.info)

    def play(
        self,
        agent: Agent,
        numbers: Sequence[int],
        stream: str = "evaluate",
        progress: Callable[[int], Any] | None = None,
    ) -> list[Played]:
        """Play the episodes `numbers` without keeping what was seen; in the order of `numbers`.

        `progress`, where given, is called with 1 as an episode ends. Raises ValueError when one breaks twice: a mean
        without it would be another number.
        """
        played = {}
        for pieces, _ in self._run(Play(self, agent, numbers, stream, keep=False), lambda: True):
            for piece in pieces:
                played[piece.episode.number] = piece.played()
                if progress is not None:
                    progress(1)
        return [played[number] for number in numbers]

    def offer(self, agent: Agent) -> None:
        """From any thread: `agent` shall act from the next pick-up of `blocks` on. Only the newest offer is kept.

        It must be a new object: one that acts already is not taken over from.
        """
        self.offers.append(agent)

    def stalled(self) -> tuple[int, float] | None:
        """From one other thread, again and again: (number, seconds) of the episode whose environment is being called.

        The seconds count from the first look that found it in this very call, so they are exact to the time between
        looks. None while no environment is being called.
        """
        row, steps, now = self.busy, self.steps, time.monotonic()
        episode = None if row is None else row.episode
        if episode is None:
            return None
        if (episode, steps) != self._watched[0]:
            self._watched = ((episode, steps), now)
        return episode.number, now - self._watched[1]

    def close(self) -> None:
        for row in self._rows.values():
            row.env.close()
        self._rows.clear()
        self._recordings.clear()

    def _run(
        self, play: Play, due: Callable[[], bool], most: int = 1 << 62
    ) -> Iterator[tuple[list[Piece], dict[str, np.ndarray]]]:
        """Play until all has ended; the pieces so far and their rows whenever `due`, or where the recording is full.

        `most`: rows after which the pieces that follow are for the next time.
        """
        self._turn += 1
        turn = self._turn
        while play.active or play.pieces:
            if play.pieces and (play.full or not play.active or due()):
                yield play.take(most)
                if turn != self._turn:
                    raise RuntimeError("another collect or play began before this one ended; close() this one first")
                continue
            if play.full:
                play.make_room()
            play.step()

    def row(self, index: int) -> Row:
        if index not in self._rows:
            self._rows[index] = Row(index, make_env(self.config))
        return self._rows[index]

    def recording(self, keep: bool) -> Recording:
        """Kept for the next call: large ones cost more to make than a few episodes cost to play."""
        if keep not in self._recordings:
            self._recordings[keep] = Recording(self.columns, self.codec, self.envs, keep)
        self._recordings[keep].restart()
        return self._recordings[keep]
