"""An online run on Ray: collectors, a learner group and an evaluator, each with an order of its own under way."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from raywm.config import RunConfig
from raywm.loops.online_work import Answer, OnlineCollector, OnlineLearner, OnlineParts, Post
from raywm.runtime.cluster import connect, environment_modules, on, seat, spread
from raywm.runtime.needs import Need
from raywm.runtime.pool import START_FAILURES, PoolError, _cause
from raywm.runtime.rollouts import Rollouts
from raywm.runtime.shards import ShardedReplay
from raywm.runtime.workers import IN_FLIGHT, CollectWorker

GROUP_S = 60.0  # for a group of learners to find each other, and for one of them to be waited for by the others
BLAME_S = 5.0  # in which a death that made another rank fail is seen


class CollectActor(CollectWorker):
    """An ``OnlineCollector`` that hands its blocks to the nearest shard."""

    def __init__(self, parts: OnlineParts, shards: Sequence[tuple[str, Any]]):
        config = parts.config
        super().__init__(config.env, config.seed, config.collect.envs, shards, config.collect.stall_s)
        torch.set_num_threads(1)
        self._flying: list[Any] = []
        self.online = OnlineCollector(parts, self.collector, self._add, self._added, self.common)

    def _add(self, block: pa.Table) -> None:
        self._flying.append(self.shard.add.remote(block))
        if len(self._flying) > IN_FLIGHT:
            ray.get(self._flying.pop(0))

    def _added(self) -> None:
        ray.get(self._flying)
        self._flying.clear()

    def advance(self, *args: Any) -> Any:
        """See `OnlineCollector.advance`."""
        return self.online.advance(*args)

    def play(self, *args: Any) -> Any:  # type: ignore[override]
        """See `OnlineCollector.play`."""
        return self.online.play(*args)


class LearnActor(OnlineLearner):
    """An ``OnlineLearner``; several of them are a torch.distributed group, which rank 0 listens for at `address`."""

    def __init__(self, parts: OnlineParts, replay: ShardedReplay, rank: int, ranks: int, address: str | None):
        torch.set_num_threads(parts.threads())
        if ranks > 1:
            backend = "nccl" if parts.config.dreamer.num_gpus >= 1 else "gloo"
            torch.distributed.init_process_group(
                backend, init_method=address, rank=rank, world_size=ranks, timeout=timedelta(seconds=GROUP_S)
            )
        super().__init__(parts, replay, rank, ranks)


class _Host:
    """The actor: holds one instance of a class that arrives by a call, so that what it raises comes back as itself."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name

    def address(self) -> str:
        """Where a group may meet."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    @ray.method(num_returns=2)
    def start(self, cls: type, args: tuple, *more: Any) -> tuple[dict[str, Any], None]:
        self._worker = cls(*args, *more)
        return {"pid": os.getpid()}, None

    @ray.method(num_returns=2)
    def work(self, method: str, *args: Any) -> Any:
        """(report, payload): what is returned belongs to the driver, and outlives this process."""
        return getattr(self._worker, method)(*args)


class RayPost(Post):
    """A place in the run and the actors in it now, which get every order together and die together.

    Args:
        kind, index: name it; cls, args: by rank, of the class the actors hold; options: of the actors; timeout_s: an
            order that takes longer is lost with them, None waits for ever.
    """

    def __init__(
        self,
        kind: str,
        index: int,
        cls: type,
        args: Sequence[tuple],
        options: dict[str, Any],
        timeout_s: float | None = None,
    ):
        super().__init__(kind, index)
        self._cls, self._args, self._options, self._timeout_s = cls, args, options, timeout_s
        self._actors: list[Any] = []
        self.waiting: dict[Any, int] = {}  # reference of a report: rank
        self._reports: dict[int, Any] = {}
        self._payload: Any = None
        self._what, self._order = "", ()  # type: str, tuple
        self._since = self._retry_at = 0.0
        self._failures = 0
        self._ever = False
        self.pids: list[int] = []

    def spawn(self) -> None:
        """Start the actors, if it is time to; `settle` brings "started"."""
        if self._actors or time.monotonic() < self._retry_at:
            return
        host: Any = ray.remote(_Host)
        options = {**self._options, "max_restarts": 0, "max_task_retries": 0}
        names = [f"{self.name}.{rank}" for rank in range(len(self._args))]
        self._actors = [host.options(**options, **seat(name, options)).remote(name) for name in names]
        more = []
        if len(self._actors) > 1:
            more = [self._actors[0].address.remote()]
        elif self.kind == "learn":
            more = [None]
        self._sent("started", (), [a.start.remote(self._cls, args, *more) for a, args in zip(self._actors, self._args)])

    def order(self, method: str, args: tuple) -> None:
        self.free = False
        self._sent(method, args, [actor.work.remote(method, *args) for actor in self._actors])

    def _sent(self, what: str, args: tuple, refs: list[Any]) -> None:
        self._what, self._order, self._since, self._reports = what, args, time.monotonic(), {}
        self.waiting = {report: rank for rank, (report, _) in enumerate(refs)}
        self._payload = refs[0][1]

    def settle(self, ref: Any) -> Answer | None:
        """Take in a report that is ready: the answer, once all ranks have reported. Raises what the work raised."""
        if ref not in self.waiting:  # of a group that has died meanwhile
            return None
        rank = self.waiting.pop(ref)
        try:
            self._reports[rank] = ray.get(ref)
        except RayTaskError as error:
            if not self._died_of_another():
                raise _cause(error) from error
            return self.bury("another of its group died")
        except RayError as error:
            return self.bury(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        if self.waiting:
            return None
        if self._what == "started":
            self.pids = [self._reports[rank]["pid"] for rank in range(len(self._args))]
        else:
            self._failures = 0
        self.free = True
        return Answer(self, self._what, self._reports[0], self._payload)

    def _died_of_another(self) -> bool:
        """Whether an error in one rank is only the echo of another one's death."""
        refs, until = list(self.waiting), time.monotonic() + BLAME_S
        for ref in refs:
            try:
                ray.get(ref, timeout=max(0.0, until - time.monotonic()))
            except GetTimeoutError:
                continue
            except RayActorError:
                return True
            except RayError:
                continue
        return False

    def overdue(self) -> bool:
        """Whether its order takes too long."""
        late = self._timeout_s is not None and time.monotonic() - self._since > self._timeout_s
        return late and bool(self.waiting) and self._what != "started"

    def bury(self, reason: str) -> Answer:
        """Kill the actors; others are started, later if that keeps failing."""
        for actor in self._actors:
            ray.kill(actor)
        pids, order = self.pids, self._order
        self._actors, self.waiting, self.pids, self.free, self._order = [], {}, [], False, ()
        self._failures += 1  # until an order is answered
        self._retry_at = time.monotonic() + (0.0 if self._failures == 1 else min(2.0**self._failures, 10.0))
        if self._failures > START_FAILURES:
            raise PoolError(f"{self.name} died {self._failures} times without answering an order: {reason}")
        doing = f" in {self._what}" if self._what else ""
        return Answer(self, "died", f"pid {', '.join(map(str, pids))}{doing}: {reason}", order)

    def kill(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


class RayOnline:
    """Who carries out an online run's orders on Ray. No death of a worker ends the run; its order is lost with it.

    Args:
        config: the run's; out: the run directory; address: of a running cluster, else a private local Ray starts.
        parts: of the run, where they are made already.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        address: str | None = None,
        say: Callable[[str], None] = print,
        parts: OnlineParts | None = None,
    ):
        self.config, self.parts, self.say, self.deaths = config, parts or OnlineParts(config), say, 0
        d, workers = config.dreamer, config.collect.workers
        self._started = not ray.is_initialized()
        self._cpus, labels = d.threads or 1, config.collect.labels  # all cores of a laptop are not asked for twice
        needs = [
            Need("collector", "collect.workers", workers, labels=labels),
            Need("evaluator", labels=labels),
            Need("learner", "dreamer.learners", d.learners, self._cpus, d.num_gpus, d.labels),
        ]
        connect(address or config.address, needs, modules=environment_modules(config.env.id), say=say)
        self.rollouts = Rollouts(
            config.env,
            config.collect,
            config.replay,
            config.seed,
            Path(out) / "episodes",
            self.parts.columns,
            self.parts.codec,
            say=say,
        )
        self.replay: Any = None
        places, timeout = self.rollouts.shards.places(), config.collect.timeout_s
        one = {"num_cpus": 1, **spread(labels)}
        learn = {"num_cpus": self._cpus, "num_gpus": d.num_gpus, **on(d.labels)}
        self.learn = RayPost("learn", 0, LearnActor, [], learn)
        collect = [RayPost("collect", i, CollectActor, [(self.parts, places)], one, timeout) for i in range(workers)]
        self.posts = [self.learn, *collect, RayPost("evaluate", 0, CollectActor, [(self.parts, places)], one)]

    def start(self, until: Any) -> ShardedReplay:
        """Open the replay, what came after the marks `until` set aside, and start everybody."""
        self.replay = ShardedReplay(self.rollouts.shards, until, **self.parts.law)
        ranks = self.config.dreamer.learners
        self.learn._args = [(self.parts, self.replay, rank, ranks) for rank in range(ranks)]
        for post in self.posts:
            post.spawn()
        return self.replay

    @property
    def marks(self) -> list[dict[str, Any]]:
        """The replay's high-water marks, one a shard."""
        return self.replay.mark

    def order(self, post: RayPost, method: str, *args: Any) -> None:
        """Give a free post something to do; `wait` brings the answer."""
        post.order(method, tuple(ray.put(dict(a)) if isinstance(a, Mapping) else a for a in args))

    def wait(self, timeout: float) -> list[Answer]:
        """What has been answered, and who has died, within so many seconds."""
        for post in self.posts:
            post.spawn()
        refs = {ref: post for post in self.posts for ref in post.waiting}
        if not refs:
            time.sleep(timeout)
            return []
        ready, _ = ray.wait(list(refs), num_returns=1, timeout=timeout, fetch_local=False)
        if ready:
            ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)
        answers = [refs[ref].settle(ref) for ref in ready]
        for post in self.posts:
            if post.overdue():
                answers.append(post.bury(f"no answer within {post._timeout_s:g} s"))
        heard = [answer for answer in answers if answer is not None]
        self.deaths += sum(answer.what == "died" for answer in heard)
        return heard

    def fetch(self, payload: Any) -> Any:
        """What a payload stands for."""
        return ray.get(payload) if isinstance(payload, ray.ObjectRef) else payload

    def pids(self) -> dict[str, list[int]]:
        """Process ids by kind of work, for tests that kill them."""
        found: dict[str, list[int]] = {}
        for post in self.posts:
            found.setdefault(post.kind, []).extend(post.pids)
        return found

    def __enter__(self) -> RayOnline:
        return self

    def __exit__(self, *exc: object) -> None:
        for post in self.posts:
            post.kill()
        try:
            self.rollouts.close()
        finally:
            if self._started:
                ray.shutdown()
