"""`raywm bench collect`: what collecting costs beside stepping the environment, and beside RLlib's EnvRunners.

For each environment, in one run and in turns, with random actions and two processes that play:

- floor: two bare processes that step it through the same wrappers (`make_env`) into a preallocated array, and keep
  nothing; "floor, plain gymnasium": two loops of `gymnasium.make`, which look at nothing, where no wrapper of ours
  changes anything;
- raywm: two collectors on Ray with RandomAgent that hand their blocks to a shard on disk: what `raywm collect` runs.
  What counts is what the shard has acknowledged and the driver has been told of;
- raywm --fast: the same in the environment's native vector form, where it has one;
- RLlib: two remote SingleAgentEnvRunners with two calls of half a second in flight each, whose samples travel into the
  object store and no further; and with the default policy of its PPO where that takes the observations (no images).

All that are seeded play as many environments in a process: 8, as a run does, or 1 where an episode takes seconds. Only
one contender is at work at a time; what the processes of the others use meanwhile is measured, and said where it is not
next to nothing. Rates on Ray are taken in the steady state, from answer to answer of each worker, so that units of work
that are cut by the ends of a window do not blur them. A ratio is the median of the ratios of each turn.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from raywm import config as configs
from raywm.agent import RandomAgent
from raywm.bench.bare import FLOOR, PLAIN, columns_of, plain_loop, wrapped_loop
from raywm.bench.common import Group, Say, Work, cell, cpu_seconds, finish, machine, ratio, spread
from raywm.config import CollectConfig, EnvConfig, ReplayConfig
from raywm.envs import make_env
from raywm.envs.make import DEFAULTS
from raywm.fast import FastCollector
from raywm.loops.dataset import FAST_ENVS
from raywm.runtime.cluster import connect
from raywm.runtime.pool import WorkerPool
from raywm.runtime.rollouts import Rollouts
from raywm.spaces import ActionCodec, is_image

ENVIRONMENTS = ("CartPole-v1", "CarRacing-v3", "doom-take-cover-small")
PROCESSES = 2
ENVS = CollectConfig().envs
SLOW_RATE = 500.0  # steps/s of one process below which a unit of so many episodes takes longer than a turn
BUSY = 0.03  # of a core: what contenders that wait may use without being mentioned
RAYWM, FAST, RLLIB = "raywm", "raywm --fast", "RLlib EnvRunners"
POLICY = "RLlib EnvRunners, default policy"
TARGETS = {  # of the ratios of the environments that are measured by default
    "CartPole-v1": {
        f"{RAYWM} / {PLAIN}": 0.3,
        f"{FAST} / {PLAIN}": 0.8,
        f"{RAYWM} / {RLLIB}": 3,
        f"{RAYWM} / {POLICY}": 6,
    },
    "CarRacing-v3": {f"{RAYWM} / {FLOOR}": 0.95},
    "VizdoomTakeCover-v1": {f"{RAYWM} / {FLOOR}": 0.95},
}


class Contender(Protocol):
    """Something that collects when told to, and rests otherwise."""

    def measure(self, seconds: float) -> float:
        """Environment steps a second over about so long."""

    @property
    def pids(self) -> list[int]:
        """Its processes."""


# ------------------------------------------------------------------------------------------------------ bare loops


class Bare:
    """Processes without Ray."""

    def __init__(self, name: str, make: Callable[..., dict[str, Work]], *arguments: Any):
        self.name, self.group = name, Group(make, arguments, PROCESSES)

    @property
    def pids(self) -> list[int]:
        return self.group.pids

    def measure(self, seconds: float) -> float:
        return self.group.measure(self.name, seconds)


# ------------------------------------------------------------------------------------------------------ raywm


class Heard(NamedTuple):
    """The answer to a unit of work, as the driver got it."""

    at: float
    worker: int
    answer: Any


def listen(pool: WorkerPool) -> list[Heard]:
    """The answers to a pool's units, as they will come."""
    heard: list[Heard] = []
    settle = pool._settle

    def listening(slot: Any) -> None:
        before = len(pool._done)
        settle(slot)
        if len(pool._done) > before:
            heard.append(Heard(time.monotonic(), slot.index, pool._done[-1][1]))

    pool._settle = listening  # type: ignore[method-assign]
    return heard


def steps_of(answer: Any) -> int:
    """Steps of an answer: a number, or what ``CollectWorker.collect`` or ``collect_fast`` says of a unit."""
    if isinstance(answer, int):
        return answer
    return int(answer[1]) if isinstance(answer, tuple) else sum(played[1] for played in answer)


def rate(heard: Sequence[Heard]) -> float:
    """Steps a second of all workers together, of each from its first answer to its last one."""
    total = 0.0
    for worker in {h.worker for h in heard}:
        mine = [h for h in heard if h.worker == worker]
        if len(mine) > 1:
            total += sum(steps_of(h.answer) for h in mine[1:]) / (mine[-1].at - mine[0].at)
    return total


def window(answers: Iterator[Any], heard: list[Heard], workers: int, seconds: float, warm: int) -> list[Heard]:
    """What is heard in `seconds`, once each worker has answered `warm` times, and until each has answered twice."""
    began, at, known = math.inf, len(heard), 0
    for _ in answers:
        if len(heard) == known:
            continue  # another episode of the same unit
        known, now = len(heard), time.monotonic()
        fewest = min(sum(h.worker == worker for h in heard[at:]) for worker in range(workers))
        if began == math.inf:
            if fewest >= warm:
                began, at = now, known - 1
        elif now - began >= seconds and fewest >= 2:
            break
    return heard[at:]


class OnRay:
    """Two collectors and a shard, in the seeded way (``seeded``) and with --fast (``fast``)."""

    def __init__(self, env: EnvConfig, envs: int, directory: Path, workers: int = PROCESSES):
        made = make_env(env)
        columns, codec = columns_of(made), ActionCodec(made.action_space)
        made.close()
        # The oldest is dropped: what is measured is collecting, not the size of this disk, nor what a virtual machine
        # pays its host for memory that nobody has used before: so little is full once all is warm.
        replay, collect = ReplayConfig(capacity_mb=128), CollectConfig(workers=workers, envs=envs)
        self.rollouts = Rollouts(env, collect, replay, 0, directory, columns, codec, say=lambda text: None)
        self.rollouts.set_agent(RandomAgent(codec))
        self.heard = listen(self.rollouts.pool.ready())
        self._next = 0

    @property
    def pids(self) -> list[int]:
        return self.rollouts.pids()

    def seeded(self, seconds: float) -> float:
        """Steps/s of `raywm collect`."""
        stream = f"turn{self._next}"
        return self._rate(self.rollouts.collect(itertools.count(), stream, lambda: math.inf), seconds, warm=1)

    def fast(self, seconds: float) -> float:
        """Steps/s of `raywm collect --fast`, whose units grow to their size in three."""
        unit = 10_000 * self._next  # unit numbers name episodes
        return self._rate(self.rollouts.collect_fast(unit, FAST_ENVS, lambda: math.inf), seconds, warm=3)

    def _rate(self, answers: Any, seconds: float, warm: int) -> float:
        self._next += 1
        with contextlib.closing(answers):
            heard = window(answers, self.heard, self.rollouts.config.workers, seconds, warm)
        self.rollouts.pool.drain()
        self.heard.clear()
        return rate(heard)

    def close(self) -> None:
        self.rollouts.close()


class Part:
    """One of the ways of a contender that has several."""

    def __init__(self, measure: Callable[[float], float], owner: Any):
        self.measure, self.owner = measure, owner

    @property
    def pids(self) -> list[int]:
        return self.owner.pids


# ------------------------------------------------------------------------------------------------------ RLlib


class OneColumn(gym.ObservationWrapper):
    """`make_env`'s environment with its largest column as the observation: RLlib's default models take one."""

    def __init__(self, config: Any):
        made = make_env(dict(config))
        super().__init__(made)
        columns = columns_of(made)
        self.name = max(columns, key=lambda name: int(np.prod(columns[name].shape)))
        self.observation_space = columns[self.name]

    def observation(self, observation: Any) -> np.ndarray:
        return observation[self.name]


class RLlib:
    """Two remote EnvRunners with RLlib's settings as they come; samples stay in the object store."""

    def __init__(self, env: EnvConfig, envs: int):
        from ray.rllib.algorithms.ppo import PPOConfig
        from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

        class Runner(SingleAgentEnvRunner):
            def pid(self) -> int:
                return os.getpid()

            @ray.method(num_returns=2)
            def take(self, steps: int, random: bool) -> tuple[Any, int]:
                began, self.way = getattr(self, "way", None) != random, random
                # episodes of the one way cannot be gone on with in the other
                episodes = self.sample(num_timesteps=steps, random_actions=random, force_reset=began)
                return episodes, sum(len(episode) for episode in episodes)

        probe = OneColumn(env.model_dump())
        self.sees_images = is_image(columns_of(probe.env)[probe.name])
        probe.close()
        config = PPOConfig().environment(OneColumn, env_config=env.model_dump()).framework("torch")
        config = config.env_runners(num_env_runners=PROCESSES, num_envs_per_env_runner=envs)
        remote: Any = ray.remote(num_cpus=1)(Runner)
        self.envs, self._sizes = envs, dict[bool, int]()
        self.runners = [remote.remote(config=config, worker_index=i + 1) for i in range(PROCESSES)]
        self._pids = ray.get([runner.pid.remote() for runner in self.runners])

    @property
    def pids(self) -> list[int]:
        return list(self._pids)

    def _size(self, random: bool) -> int:
        """Steps of about half a second."""
        if random not in self._sizes:
            size, spent = self.envs, 0.0
            while spent < 0.1:
                size, began = size * 4, time.perf_counter()
                ray.get([runner.take.remote(size, random)[1] for runner in self.runners])
                spent = time.perf_counter() - began
            self._sizes[random] = max(self.envs, round(0.5 * size / spent))
        return self._sizes[random]

    def random(self, seconds: float) -> float:
        """Steps/s with random actions."""
        return self._rate(seconds, True)

    def policy(self, seconds: float) -> float:
        """Steps/s with the default policy of PPO, which explores."""
        return self._rate(seconds, False)

    def _rate(self, seconds: float, random: bool) -> float:
        size, heard = self._size(random), list[Heard]()
        flying = {
            runner.take.remote(size, random)[1]: worker for worker, runner in enumerate(self.runners) for _ in range(2)
        }

        def answers() -> Iterator[int]:
            while True:
                (ready,), _ = ray.wait(list(flying), num_returns=1)
                worker, steps = flying.pop(ready), ray.get(ready)
                heard.append(Heard(time.monotonic(), worker, steps))
                flying[self.runners[worker].take.remote(size, random)[1]] = worker
                yield steps

        measured = window(answers(), heard, PROCESSES, seconds, warm=1)
        ray.get(list(flying))
        return rate(measured)

    def close(self) -> None:
        """End the runners."""
        for runner in self.runners:
            ray.kill(runner)


# ------------------------------------------------------------------------------------------------------ the benchmark


def environments_at_once(env: EnvConfig) -> int:
    """As many as a run plays by default, or 1 where an episode takes seconds."""
    (work,) = wrapped_loop(env.model_dump(), 1).values()
    work()  # what is done once
    began = time.perf_counter()
    return ENVS if work() / (time.perf_counter() - began) >= SLOW_RATE else 1


def is_plain(env: EnvConfig) -> bool:
    """Whether ``gymnasium.make(id)`` is all that ``make_env`` makes of it, but for the names of columns."""
    return ":" not in env.id and all(getattr(env, key) == value for key, value in DEFAULTS.items() if key != "id")


def contenders(
    env: EnvConfig, envs: int, directory: Path, stack: contextlib.ExitStack, say: Say
) -> dict[str, Contender]:
    """All who can play `env`, by name; they end with `stack`."""
    made: dict[str, Contender] = {}

    def bare(name: str, make: Callable[..., dict[str, Work]], *arguments: Any) -> None:
        say(f"{env.id}: starting {name}")
        loops = Bare(name, make, *arguments)
        stack.callback(loops.group.stop)
        made[name] = loops

    bare(FLOOR, wrapped_loop, env.model_dump(), envs)
    if is_plain(env) and envs > 1:  # where a step is dear, the wrappers are not what costs
        bare(PLAIN, plain_loop, env.id)
    say(f"{env.id}: starting {RAYWM}")
    ours = stack.enter_context(contextlib.closing(OnRay(env, envs, directory)))
    made[RAYWM] = Part(ours.seeded, ours)
    with contextlib.suppress(ValueError):  # no native vector form
        FastCollector(env, 0, 1).close()
        made[FAST] = Part(ours.fast, ours)
    say(f"{env.id}: starting {RLLIB}")
    theirs = stack.enter_context(contextlib.closing(RLlib(env, envs)))
    made[RLLIB] = Part(theirs.random, theirs)
    if envs > 1 and not theirs.sees_images:  # its default policy raises on uint8 images as they come
        made[POLICY] = Part(theirs.policy, theirs)
    return made


def measure_environment(env: EnvConfig, seconds: float, turns: int, say: Say) -> dict[str, Any]:
    """Rates, ratios and what the idle contenders used, of one environment."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raywm-bench-")))
        envs = environments_at_once(env)
        all_of_them = contenders(env, envs, directory, stack, say)
        rates: dict[str, list[float]] = {name: [] for name in all_of_them}
        busy: dict[str, float] = {}
        for name, one in all_of_them.items():  # workers are up, units have their sizes
            say(f"{env.id}: warming up {name}")
            one.measure(min(seconds, 3.0))
        for turn in range(turns):
            for name, one in all_of_them.items():
                say(f"{env.id}: turn {turn + 1} of {turns}, {name}")
                others = {pid for other in all_of_them.values() for pid in other.pids} - set(one.pids)
                used, began = cpu_seconds(others), time.monotonic()
                rates[name].append(one.measure(seconds))
                share = (cpu_seconds(others) - used) / (time.monotonic() - began)
                busy[name] = max(busy.get(name, 0.0), share)
        deaths = next(one.owner.rollouts.deaths for name, one in all_of_them.items() if name == RAYWM)  # type: ignore
    pairs = [(a, b) for a in (RAYWM, FAST) for b in (FLOOR, PLAIN, RLLIB, POLICY)]
    return {
        "env": env.model_dump(mode="json"),
        "environments_a_process": {name: FAST_ENVS if name == FAST else 1 if name == PLAIN else envs for name in rates},
        "steps_per_second": {name: spread(values) for name, values in rates.items()},
        "ratios": {f"{a} / {b}": ratio(rates[a], rates[b]) for a, b in pairs if a in rates and b in rates},
        "targets": TARGETS.get(env.id, {}),
        "cores_used_by_others": busy,
        "worker_deaths": deaths,
    }


def run(
    environments: Sequence[str] = ENVIRONMENTS, seconds: float = 10.0, turns: int = 5, say: Say = lambda text: None
) -> dict[str, Any]:
    """Measure all `environments` (ids or presets), each contender for `seconds` in each of `turns` turns.

    Environments whose extras are not installed are named in "skipped", with why. Raises ValueError when none is left.
    """
    result: dict[str, Any] = {
        "machine": machine("raywm", "ray", "gymnasium", "numpy", "torch"),
        **{"seconds": seconds, "turns": turns, "processes": PROCESSES, "environments": {}, "skipped": {}},
    }
    playable = {}
    for name in environments:
        env = configs.load_environment(name).env
        try:
            make_env(env).close()
            playable[name] = env
        except ValueError as error:
            result["skipped"][name] = str(error)
    if not playable:
        raise ValueError("; ".join(result["skipped"].values()))
    started = not ray.is_initialized()
    modules = {env.id.split(":")[0] for env in playable.values() if ":" in env.id}
    connect(None, 2 * PROCESSES, modules=sorted(modules))
    try:
        for name, env in playable.items():
            result["environments"][name] = measure_environment(env, seconds, turns, say)
    finally:
        if started:
            ray.shutdown()
    return result


def _show(result: dict[str, Any], console: Console) -> None:
    for name, found in result["environments"].items():
        table = Table(title=f"{name}: environment steps/s, median (min to max) of {result['turns']} turns")
        others = [b for b in (FLOOR, PLAIN, RLLIB, POLICY) if b in found["steps_per_second"]]
        for column in ("", "steps/s", "environments", *(f"x {other}" for other in others)):
            table.add_column(column, justify="right" if column else "left")
        for who, value in found["steps_per_second"].items():
            ratios = [found["ratios"].get(f"{who} / {other}") for other in others]
            cells = [cell(r, digits=2) if r else "" for r in ratios]
            each = f"{result['processes']} x {found['environments_a_process'][who]}"
            table.add_row(who, cell(value, digits=0), each, *cells)
        console.print(table)
        for pair, least in found["targets"].items():
            if pair in found["ratios"]:
                console.print(f"{pair}: {found['ratios'][pair]['median']:.2f}, wanted {least:g}")
        for who, share in found["cores_used_by_others"].items():
            if share > BUSY:
                console.print(f"note: while {who} was measured, the others used up to {share:.2f} of a core")
        if found["worker_deaths"]:
            console.print(f"note: {found['worker_deaths']} collectors died and were replaced; measure again")
        console.print()
    for name, why in result["skipped"].items():
        console.print(f"skipped {name}: {why}")


def main(
    environments: Sequence[str] | None = None,
    seconds: float = 10.0,
    turns: int = 5,
    as_json: bool = False,
    out: str | Path | None = None,
) -> None:
    """Measure and print tables, or JSON to standard output; `out` receives the JSON as well."""
    finish(lambda say: run(environments or ENVIRONMENTS, seconds, turns, say), _show, as_json, out)
