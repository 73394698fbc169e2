"""What an online run consists of, in whatever process: its parts, who collects, who learns. The twin without Ray."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raywm.agent import Agent
from raywm.collect import Collector
from raywm.config import RunConfig
from raywm.data.prefetch import Prefetch, Source
from raywm.data.replay import Replay
from raywm.endless import Endless
from raywm.learners.dreamer import DreamerLearner
from raywm.learners.dreamer_agent import DreamerAgent
from raywm.learners.memory import keep_memory
from raywm.loops.executor import LocalRollouts
from raywm.loops.parts import DEFAULT_HORIZON, cores, described, dreamer_specification, first_agent
from raywm.loops.saved import check_dreamer
from raywm.seeding import rng
from raywm.spaces import columns_to_json

KEEP = -1  # a version: go on with the weights that are there


class OnlineParts:
    """A Dreamer config and what its environment says of itself: what all processes of the run are built from.

    Attributes: config, columns, codec, spec; ``rows`` that an update replays for the train ratio; ``length`` of the
    sequences that a learner gets, those rows and the ones in front of them that are context; ``law`` by which they
    are drawn, arguments of ``Replay``.
    Raises ValueError for config values that do not go together.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        d, o = config.dreamer, config.online
        if d.batch % d.learners:
            raise ValueError(
                f"dreamer.learners: got {d.learners}, expected a divisor of dreamer.batch={d.batch}: they share it"
            )
        if o.publish > o.staleness:
            raise ValueError(
                f"online.publish: got {o.publish}, expected at most online.staleness={o.staleness}, or collectors "
                "would wait for weights that do not come"
            )
        self.columns, self.codec, limit = described(config.env)
        self.horizon = limit or DEFAULT_HORIZON
        self.rows, self.length = d.batch * d.sequence, d.sequence + d.context
        self.law: dict[str, Any] = {"cross": True, "include_incomplete": True, "context": d.context}
        self.spec = self.specification()

    def specification(self) -> dict[str, Any]:
        """What learners and agents are built from."""
        return dreamer_specification(self.config, self.columns, self.codec)

    def spaces(self) -> dict[str, Any]:
        """What a run directory keeps of the environment, so that its agent and report need no environment."""
        return {"action": self.codec.to_json(), "columns": columns_to_json(self.columns), "horizon": self.horizon}

    def first_agent(self) -> Agent:
        """Who plays during the prefill."""
        return first_agent(self.config.collect, self.codec)

    def agent(self, policy: dict[str, Tensor], version: int, greedy: bool = False) -> Agent:
        return DreamerAgent(self.spec, policy, version, greedy=greedy)

    def renewed(self, agent: Any, policy: dict[str, Tensor], version: int) -> Agent:
        """A new object with the new weights, in place of `agent`, which must not act any more."""
        return agent.renewed(policy, version)

    def learner(self, rank: int = 0, ranks: int = 1) -> Any:
        """A ``DreamerLearner``, on a GPU if the config reserves one."""
        device = "cuda" if self.config.dreamer.num_gpus else "cpu"
        return DreamerLearner(self.spec, self.config.seed, device=device, rank=rank, ranks=ranks)

    def check(self, tensors: dict[str, Tensor], where: Path, made_by: str) -> None:
        """Raise ValueError, in one line, for a learner's saved state that is of another model than this one."""
        check_dreamer(self.spec, tensors, where, made_by, learner=True)

    def threads(self) -> int:
        """CPU threads of a learner."""
        return self.config.dreamer.threads or max(1, cores() // self.config.dreamer.learners)


class OnlineCollector:
    """A collector whose environments and recurrent states live on between two orders.

    `add` gets the blocks, and `added` is called before an order is answered: then all of them must be stored.
    Answers are (report, None): every worker of a run answers with a small report and what may be large.
    """

    def __init__(
        self,
        parts: OnlineParts,
        collector: Collector,
        add: Callable[[pa.Table], object],
        added: Callable[[], object] = lambda: None,
        common: dict[str, Any] | None = None,
    ):
        self.parts, self.collector, self.add, self.added, self.common = parts, collector, add, added, common
        self._endless: Endless | None = None
        self._agent: Agent | None = None

    def advance(
        self, steps: int, first: int, version: int = KEEP, policy: dict[str, Tensor] | None = None
    ) -> tuple[dict[str, Any], None]:
        """Take `steps` vector steps, the first time from episode number `first` on, with the weights of a new version
        if there is one; a collector that never had any plays by the first policy."""
        began = time.perf_counter()
        if policy is not None and self._agent is None:
            self._agent = self.parts.agent(policy, version)
        elif policy is not None:
            self._agent = self.parts.renewed(self._agent, policy, version)
        if self._endless is None:
            self._endless = Endless(self.collector, self._agent or self.parts.first_agent(), first, common=self.common)
        elif policy is not None and self._agent is not None:
            self._endless.offer(self._agent)
        episodes, broken, taken = [], 0, 0
        for block, played, count in self._endless.advance(steps):
            self.add(block)
            taken += count
            broken += sum(p.broken is not None for p in played)
            episodes += [(p.number, p.steps, p.ret, p.info["version"]) for p in played if p.broken is None]
        self.added()
        seconds = time.perf_counter() - began
        return {"steps": taken, "episodes": episodes, "broken": broken, "vector": steps, "seconds": seconds}, None

    def play(
        self, numbers: list[int], stream: str, version: int, policy: dict[str, Tensor]
    ) -> tuple[dict[str, Any], None]:
        """Play episodes with the greedy agent, keeping nothing; [(number, steps, return)] of them."""
        began, self._endless = time.perf_counter(), None  # its environments are used
        played = self.collector.play(self.parts.agent(policy, version, greedy=True), numbers, stream)
        seconds = time.perf_counter() - began
        return {"episodes": [(p.number, p.steps, p.ret) for p in played], "seconds": seconds}, None

    def close(self) -> None:
        self.collector.close()


class Memory(Source, Protocol):
    """Where a learner's batches come from, and where its states go: a ``Replay``, or shards of it."""

    def write(self, keys: np.ndarray, states: Mapping[str, np.ndarray]) -> None:
        """Keep what the model knows after rows of batches; see ``Replay.write``."""


class OnlineLearner:
    """A learner and the batches made ready for it: one of `ranks` that share each batch. What the model knows after the
    rows it was trained on goes back to the replay, which starts later sequences from there."""

    def __init__(self, parts: OnlineParts, replay: Memory, rank: int = 0, ranks: int = 1):
        self.parts, self.replay, self.rank, self.ranks = parts, replay, rank, ranks
        keep_memory()
        self.learner = parts.learner(rank, ranks)
        self._batches: Prefetch | None = None
        self._copied: tuple[np.ndarray, dict[str, Tensor], Any] | None = None  # rows, their states, and once they are

    def begin(self, tensors: dict[str, Tensor] | None) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
        """Go on from what ``save`` gave, or from where it is; the policy's weights."""
        if tensors is not None:
            self.learner.load(tensors)
        return {"updates": int(self.learner.updates)}, self._policy(True)

    def update(self, count: int, publish: bool) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
        """So many updates: the means of their metrics; and the policy's weights where they are to be published."""
        began, config = time.perf_counter(), self.parts.config
        if self._batches is None:
            # a stream of its own after every restart: where the last one was is not known
            stream = rng(config.seed, "replay", self.rank, int(self.learner.updates))
            device = "cuda" if config.dreamer.num_gpus else "cpu"
            share = config.dreamer.batch // self.ranks
            self._batches = Prefetch(self.replay, share, self.parts.length, stream, device=device)
        waited, sums = self._batches.waited, dict[str, Tensor]()
        for _ in range(count):
            batch = self._batches.next()
            for name, value in self.learner.update(batch).items():
                sums[name] = sums[name] + value if name in sums else value.detach().clone()
            self._write_back(batch.rows)
        self._write_back(None)
        metrics = {name: float(value) / count for name, value in sums.items()}
        policy = self._policy(publish)
        seconds = time.perf_counter() - began
        waited = self._batches.waited - waited
        return {"count": count, "metrics": metrics, "seconds": seconds, "waited": waited}, policy

    def _write_back(self, rows: np.ndarray | None) -> None:
        """Begin to copy the states of the last update's rows (B, T) to the host, and write those of the one before: a
        GPU is not waited for while it has something to do."""
        copied, self._copied = self._copied, None
        if rows is not None:
            states = {name: value.to("cpu", non_blocking=True) for name, value in self.learner.latents().items()}
            event = torch.cuda.current_stream().record_event() if self.parts.config.dreamer.num_gpus else None
            self._copied = rows[:, self.parts.config.dreamer.context :].reshape(-1), states, event
        if copied is not None:
            keys, states, event = copied
            if event is not None:
                event.synchronize()
            self.replay.write(keys, {name: value.numpy() for name, value in states.items()})

    def save(self) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
        """Everything to go on from, for ``begin``: the same on all ranks."""
        return {}, None if self.rank else self.learner.tensors()

    def _policy(self, wanted: bool) -> dict[str, Tensor] | None:
        return self.learner.policy() if wanted and not self.rank else None

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()


class Answer(NamedTuple):
    """What an executor's `wait` brings: of an order ("advance", ...), or that a post has "started" or "died" (`report`
    says why, `payload` are the arguments of the order that was lost)."""

    post: Any
    what: str
    report: Any
    payload: Any  # for `fetch`


class Post:
    """A place in the run: `kind` is "collect", "learn" or "evaluate". `free`: it takes an order."""

    def __init__(self, kind: str, index: int = 0):
        self.kind, self.index, self.free = kind, index, False

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.index}"


class LocalOnline:
    """All of an online run in one process: orders are carried out one after another. The twin of ``RayOnline``."""

    deaths = 0

    def __init__(self, config: RunConfig, out: Path, parts: OnlineParts | None = None):
        if config.dreamer.learners > 1:
            raise ValueError(f"dreamer.learners: got {config.dreamer.learners} with --in-process, expected 1")
        self.config, self.parts = config, parts or OnlineParts(config)
        self.rollouts = LocalRollouts(
            config.env,
            config.collect,
            config.replay,
            config.seed,
            out / "episodes",
            self.parts.columns,
            self.parts.codec,
        )
        self.posts = [Post("learn"), Post("collect"), Post("evaluate")]
        self._workers: dict[str, Any] = {}
        self._orders: deque[tuple[Post, str, tuple]] = deque()

    def start(self, until: Any) -> Replay:
        """Open the replay, what came after the mark `until` set aside, and start everybody."""
        config, store = self.config, self.rollouts.store
        self.replay = Replay(store, self.parts.codec, until=None if until is None else until[0], **self.parts.law)
        torch.set_num_threads(self.parts.threads())
        common = {"collector": "in-process", "env_config": config.env.model_dump(mode="json")}
        collector = OnlineCollector(self.parts, self.rollouts.collector, store.add, common=common)
        evaluator = Collector(config.env, config.seed, config.collect.envs)
        self._workers = {
            "learn": OnlineLearner(self.parts, self.replay),
            "collect": collector,
            "evaluate": OnlineCollector(self.parts, evaluator, store.add),
        }
        self._orders.extend((post, "started", ()) for post in self.posts)
        return self.replay

    @property
    def marks(self) -> list[dict[str, Any]]:
        """The replay's high-water marks, one a shard."""
        return [self.replay.mark]

    def order(self, post: Post, method: str, *args: Any) -> None:
        """Give a free post something to do; `wait` brings the answer."""
        post.free = False
        self._orders.append((post, method, args))

    def wait(self, timeout: float) -> list[Answer]:
        """What has been answered; here: the oldest order is carried out."""
        if not self._orders:
            time.sleep(timeout)
            return []
        post, method, args = self._orders.popleft()
        report, payload = ({"pid": os.getpid()}, None)
        if method != "started":
            report, payload = getattr(self._workers[post.kind], method)(*args)
        post.free = True
        return [Answer(post, method, report, payload)]

    def fetch(self, payload: Any) -> Any:
        """What a payload stands for."""
        return payload

    def __enter__(self) -> LocalOnline:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers.values():
            worker.close()
        self.rollouts.close()
