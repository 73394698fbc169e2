"""How a collector's rows are stepped together: episodes begin, end, break and are tried again, agents take over.

Used by ``raywm.collect``; imports no torch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from raywm.agent import Agent
from raywm.data.episode import piece_header
from raywm.envs.make import Columns, make_env
from raywm.seeding import derive, rng

if TYPE_CHECKING:
    from raywm.collect import Collector

MAY_BREAK, BROKEN_SHARE = 3, 0.1  # episodes, and share of the episodes, that may break before it is an error


class Played(NamedTuple):
    """What evaluation needs of an episode; `broken` says why it is kept out, and then there is no return (nan)."""

    number: int
    ret: float
    steps: int
    info: dict[str, Any]
    broken: str | None = None


class Row:
    """One environment and the episode that is being played in it."""

    def __init__(self, index: int, env: Columns) -> None:
        self.index = index
        self.episode: Running | None = None
        self._use(env)

    def _use(self, env: Columns) -> None:
        # The recording copies what it sees, so the copy that env.step would make is left out.
        self.env, self.step, self.write = env, env.env.step, env.write

    def renew(self, config: Any) -> None:
        """The environment broke: another one."""
        with contextlib.suppress(Exception):
            self.env.close()
        self._use(make_env(config))


class Running:
    """One episode that is being played, or whose last rows wait to be handed over."""

    def __init__(self, id: str, number: int, seed: int, env: str, begin: int, lane: Lane) -> None:
        self.id, self.number, self.seed, self.env = id, number, seed, env
        self.begin = self.sent = begin  # times: of its first row, of the first one that is not in a piece
        self.lane = lane
        self.policy, self.version = lane.agent.name, lane.agent.version
        self.rewards: list[np.ndarray] = []  # of the pieces that are gone


class Piece:
    """Rows of an episode that are to be handed over: `rows` from time `begin` on in row `row`."""

    def __init__(self, episode: Running, row: int, rows: int, ended: bool, terminal: bool = False) -> None:
        self.episode, self.row, self.rows, self.ended, self.terminal = episode, row, rows, ended, terminal
        self.begin, self.ret, self.version = episode.sent, math.nan, episode.lane.agent.version
        self.broken: str | None = None
        episode.sent += rows

    @cached_property
    def info(self) -> dict[str, Any]:
        """Once the return is known."""
        # Nothing that differs between two plays of one episode (times, hosts) may enter: duplicates are equal bits.
        e = self.episode
        info = {"number": e.number, "seed": e.seed, "env": e.env, "policy": e.policy, "version": e.version}
        if self.broken is not None:
            return info | {"broken": self.broken}
        if self.version != e.version:
            info["versions"] = [e.version, self.version]
        if self.ended:
            info["return"] = self.ret
        return info

    def header(self) -> dict[str, Any]:
        first = 0 if self.broken is not None else self.begin - self.episode.begin
        return piece_header(self.episode.id, first, self.rows, self.ended, self.info)

    def played(self) -> Played:
        steps = 0 if self.broken is not None else self.begin + self.rows - 1 - self.episode.begin
        return Played(self.episode.number, self.ret, steps, self.info, self.broken)


class Lane:
    """An agent that acts for some of the rows, on a batch of all."""

    def __init__(self, agent: Agent, rows: int, nobody: np.random.Generator) -> None:
        self.rngs = [nobody] * rows
        self.use(agent)

    def use(self, agent: Agent) -> None:
        try:
            self.agent, self.state, self.new = agent, agent.initial(len(self.rngs)), True
        except Exception as error:
            raise ValueError(f"agent {agent.name!r} failed in initial: {type(error).__name__}: {error}") from error


class Play:
    """The episodes of one call, stepped together.

    A row whose episode has ended begins its next one instead of the next step: its last observation keeps its time.
    """

    def __init__(
        self,
        collector: Collector,
        agent: Agent,
        numbers: Sequence[int],
        stream: str,
        *,
        keep: bool = True,
        pickup: Literal["episode"] | int | None = None,
        piece_rows: int | None = None,
    ) -> None:
        self.collector, self.stream, self.keep, self.pickup = collector, stream, keep, pickup
        self.piece_rows = piece_rows
        self.recording = collector.recording(keep)
        self.waiting: list[deque[int]] = [deque() for _ in range(collector.envs)]
        for number in numbers:
            self.waiting[number % collector.envs].append(number)
        self.active = [collector.row(index) for index, queue in enumerate(self.waiting) if queue]
        for row in self.active:
            row.episode = None  # an earlier call may have been closed early
        self.idle = [index for index, queue in enumerate(self.waiting) if not queue]
        # Rows that do not play in a lane must draw from something, and nobody sees what: from this at first, and later
        # from what is left of the lane's last episode there.
        self._nobody = rng(collector.seed, "idle")
        self.lanes = [Lane(agent, collector.envs, self._nobody)]  # the newest is the last
        self.pieces: list[Piece] = []
        self.rows = 0  # of the pieces
        self._began: list[int] = []  # rows whose episode began with the last step
        self._tried: set[int] = set()  # episodes that broke once
        self._started = False
        self._plain = self.active[0].env.plain if self.active else None
        self._patience = collector.max_steps if piece_rows is None else min(collector.max_steps, piece_rows - 1)
        self._alarm = 0  # the time at which the running episodes must be looked at
        self._until = self.recording.room  # the time that would overwrite a row that is still needed

    @property
    def full(self) -> bool:
        return self.recording.time + 1 >= self._until

    def make_room(self) -> None:
        """The pieces are gone; where the running episodes fill the recording, enlarge it."""
        recording, keep = self.recording, [row.episode.sent for row in self.active if row.episode is not None]
        oldest = min(keep, default=recording.time)
        if recording.time + 1 - oldest >= recording.room:
            recording.grow(oldest)
        self._until = oldest + recording.room

    def flush(self) -> None:
        """What running episodes have seen and not handed over becomes pieces."""
        for row in self.active:
            if row.episode is not None and self.recording.time + 1 > row.episode.sent:
                self._cut(row, False)

    def take(self, rows: int) -> tuple[list[Piece], dict[str, np.ndarray]]:
        """The first of the pieces, as many as it takes to have so many rows, and (with `keep`) their rows.

        Sets the returns of episodes that have ended.
        """
        count = len(self.pieces)
        if self.rows > rows:
            totals = itertools.accumulate(piece.rows for piece in self.pieces)
            count = 1 + next(index for index, total in enumerate(totals) if total >= rows)
        pieces, self.pieces = self.pieces[:count], self.pieces[count:]
        self.rows -= sum(piece.rows for piece in pieces)
        spans = [(p.row, p.begin, p.rows) for p in pieces]
        columns: dict[str, np.ndarray] = {}
        if self.keep:
            flags = [(p.rows > 0 and p.begin == p.episode.begin, p.rows > 0 and p.ended, p.terminal) for p in pieces]
            columns = self.recording.gather(*np.array(spans).T, *np.array(flags).T)
        stop = 0
        for piece, span in zip(pieces, spans):
            start, stop = stop, stop + piece.rows
            if piece.broken is not None:
                continue
            earlier = piece.episode.rewards
            reward = columns["reward"][start:stop] if self.keep else self.recording.rewards(*span)
            if not piece.ended:
                earlier.append(reward.copy())
                continue
            whole = np.concatenate([*earlier, reward]) if earlier else reward
            piece.ret = float(whole.sum(dtype=np.float64))  # the very sum of Episode.ret
        return pieces, columns

    def step(self) -> None:
        """One vector step: every row takes a step, or begins its next episode."""
        recording, collector = self.recording, self.collector
        action: Any = None
        if self._started:
            action = self._act()
            recording.advance(action)
            if self.idle:
                recording.clear(self.idle)
        self._started, self._began = True, []
        collector.steps += 1
        reward_of, at = recording.reward, recording.time
        plain = None if self._plain is None else recording.now[self._plain]
        shape = None if plain is None else plain.shape[1:]
        failed: list[tuple[Row, str, Exception | None]] = []
        ended: list[tuple[Row, bool]] = []
        for row in self.active:
            index, collector.busy = row.index, row
            try:
                if row.episode is None:
                    self._begin(row)
                    continue
                obs, reward, terminated, truncated, _ = row.step(action[index])
                if plain is not None and obs.__class__ is np.ndarray and obs.shape == shape:
                    plain[index] = obs  # what _see would do, without its dict
                else:
                    self._see(row, obs)
                reward_of[index] = float(reward)  # numpy would make a nan of None
                if terminated or truncated:
                    ended.append((row, bool(terminated)))
            except Exception as error:
                failed.append((row, f"{type(error).__name__}: {error}", error))
        collector.busy = None
        if not recording.finite():
            broke = {row.index for row, *_ in failed}
            faults = [(row, recording.fault(row.index)) for row in self.active if row.index not in broke]
            failed += [(row, fault, None) for row, fault in faults if fault is not None]
        if failed:
            ended = [(row, terminated) for row, terminated in ended if all(row is not other for other, *_ in failed)]
            for row, what, cause in failed:
                self._fail(row, what, cause)
        for row, terminated in ended:
            self._end(row, terminated)
        if at >= self._alarm:
            self._look_after()

    def _act(self) -> np.ndarray:
        """Actions (rows, *shape), each by the agent that plays the row's episode."""
        if self.pickup is not None and self.pickup != "episode" and self.collector.offers:
            if (self.recording.time + 1) % self.pickup == 0:
                self._switch()
        is_first = np.zeros(self.collector.envs, bool)
        if self._began:
            is_first[self._began] = True
        acted = self._act_in(self.lanes[0], is_first)
        if len(self.lanes) > 1:
            acted = acted.copy()
            for lane in self.lanes[1:]:
                rows = [row.index for row in self.active if row.episode is not None and row.episode.lane is lane]
                acted[rows] = self._act_in(lane, is_first)[rows]
        return acted

    def _act_in(self, lane: Lane, is_first: np.ndarray) -> np.ndarray:
        if lane.new:  # whatever its rows have seen, the agent has not
            lane.new, is_first = False, np.ones(len(is_first), bool)
        agent, recording = lane.agent, self.recording
        try:
            action, lane.state = agent.act(recording.now, lane.state, is_first, lane.rngs)
        except Exception as error:
            rows = [row for row in self.active if row.episode is not None and row.episode.lane is lane]
            playing = ", ".join(str(row.episode.number) for row in rows if row.episode is not None)
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"agent {agent.name!r} failed in act, playing episodes {playing}: {what}") from error
        shape = (self.collector.envs, *self.collector.codec.shape)
        if getattr(action, "shape", None) != shape:
            raise ValueError(f"agent {agent.name!r} acted {np.shape(action)}, expected {shape}: an action a row")
        return action

    def _offered(self) -> Agent | None:
        """The newest agent offered, once."""
        agent = self.collector.offers.popleft() if self.collector.offers else None
        return None if agent is self.lanes[-1].agent else agent

    def _switch(self) -> None:
        """All rows go on with the newest agent, and with their states where it is of the same kind."""
        agent, (lane,) = self._offered(), self.lanes
        if agent is None:
            return
        if type(agent) is type(lane.agent):
            lane.agent = agent
        else:
            lane.use(agent)

    def _begin(self, row: Row) -> None:
        """Start the next episode of a row."""
        collector, recording, index = self.collector, self.recording, row.index
        if self.pickup == "episode" and collector.offers:
            agent = self._offered()
            if agent is not None:
                self.lanes.append(Lane(agent, collector.envs, self._nobody))
        number, lane = self.waiting[index].popleft(), self.lanes[-1]
        seed = derive(collector.seed, self.stream, "env", number)
        episode = Running(f"{self.stream}-{number:09d}", number, seed, collector.id, recording.time, lane)
        row.episode = episode
        if len(self.lanes) > 1:  # those whose last episode has ended go
            playing = {id(other.episode.lane) for other in self.active if other.episode is not None}
            self.lanes = [lane for lane in self.lanes if id(lane) in playing]
        lane.rngs[index] = rng(collector.seed, self.stream, "act", number)
        self._began.append(index)
        self._alarm = min(self._alarm, episode.begin + self._patience)
        self._see(row, row.env.env.reset(seed=seed)[0])
        recording.reward[index] = 0

    def _see(self, row: Row, obs: Any) -> None:
        row.write(obs, self.recording.now, row.index)

    def _end(self, row: Row, terminated: bool) -> None:
        assert row.episode is not None
        self._cut(row, True, terminated)
        self.collector.played += 1
        self._leave(row)

    def _cut(self, row: Row, ended: bool, terminated: bool = False) -> None:
        """What an episode has seen and not handed over becomes a piece."""
        episode = row.episode
        assert episode is not None
        rows = self.recording.time + 1 - episode.sent
        self.pieces.append(Piece(episode, row.index, rows, ended, terminated))
        self.rows += rows

    def _leave(self, row: Row) -> None:
        """A row's episode is over; where none waits, the row idles."""
        row.episode = None
        if not self.waiting[row.index]:
            self.active.remove(row)
            self.idle.append(row.index)

    def _fail(self, row: Row, what: str, error: Exception | None) -> None:
        """The environment of a row broke: another one, and the episode once more or never again."""
        collector, episode = self.collector, row.episode
        assert episode is not None
        said = f"step {self.recording.time - episode.begin}: {what}"
        collector.busy = row  # making an environment may hang as well as stepping it
        row.renew(collector.config)
        collector.busy = None
        collector.restarts += 1
        self.recording.clear(row.index)
        self.pieces = [piece for piece in self.pieces if piece.episode is not episode]  # it begins again, or is void
        self.rows = sum(piece.rows for piece in self.pieces)
        if episode.number not in self._tried:
            self._tried.add(episode.number)
            self.waiting[row.index].appendleft(episode.number)
        else:
            collector.broken += 1
            count, broken = collector.played + collector.broken, collector.broken
            if not self.keep or broken > max(MAY_BREAK, BROKEN_SHARE * count):
                raise ValueError(
                    f"environment {collector.id!r}, episode {episode.number}, {said} (twice); "
                    f"{broken} of {count} episodes broke"
                ) from error
            mark = Piece(episode, row.index, 0, True)
            mark.broken = said
            self.pieces.append(mark)
        self._leave(row)

    def _look_after(self) -> None:
        """Episodes that are too long, or long enough for a piece; sets the next time to look."""
        now, most, piece = self.recording.time, self.collector.max_steps, self.piece_rows
        alarm = now + most
        for row in self.active:
            episode = row.episode
            if episode is None:
                continue
            if now - episode.begin >= most:
                raise ValueError(
                    f"environment {self.collector.id!r}, episode {episode.number}, step {now - episode.begin}: "
                    "still no end of the episode; set env.time_limit"
                )
            if piece is not None and now + 1 - episode.sent >= piece:
                self._cut(row, False)
            alarm = min(alarm, episode.begin + most, now + most if piece is None else episode.sent + piece - 1)
        self._alarm = alarm
