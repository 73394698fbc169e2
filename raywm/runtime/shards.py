"""The replay of a run as Ray actors: one shard of it on each node that stores, around an episode store."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import RayTaskError

from raywm.checkpoint import atomic_write_json
from raywm.data.batch import Batch
from raywm.data.episode import Episode, from_block
from raywm.data.mirror import folders
from raywm.data.replay import SHARD_BITS
from raywm.data.shards import allot, merge, shards_of
from raywm.data.store import EpisodeStore
from raywm.loops.parts import Played
from raywm.runtime.shard import NotOpenError, ReplayShard
from raywm.spaces import columns_to_json

Answer = TypeVar("Answer")


def place(
    directory: Path, on_nodes: bool, storage: str | None = None, labels: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Which shards a run has, by the name of their directory, and the id of the node where each belongs.

    Either the embedded one, in `directory` itself on this node; or one on each node with CPUs and these labels. Those
    that an earlier start of the run had stay, on the node that has their disk if it is still there:
    `directory`/shards.json knows, or, where it is gone, their names in the storage tell. Names end at random: what
    another run has left in this path on some node is never taken for this one's.
    """
    here = ray.get_runtime_context().get_node_id()
    if not on_nodes:
        return {"": here}
    able = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    able = [n for n in able if (labels or {}).items() <= n["Labels"].items()]
    nodes = {n["NodeID"]: n["NodeManagerAddress"] for n in able}
    free = sorted(nodes, key=lambda node: (node != here, node))
    record = directory / "shards.json"
    before: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    if not before and storage is not None:
        before = dict.fromkeys((name for name in folders(storage) if name.startswith("shard-")), "")
    places: dict[str, str] = {}
    for name, address in before.items():
        places[name] = next((n for n in free if nodes[n] == address), "")
        free = [n for n in free if n != places[name]]
    for index, name in enumerate(name for name, node in places.items() if not node):
        places[name] = list(nodes)[index % len(nodes)]
    for node in free:
        if node not in places.values():
            places[f"shard-{len(places):03d}-{uuid.uuid4().hex[:8]}"] = node
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write_json(record, {name: nodes[node] for name, node in places.items()})
    return places


class Shards:
    """All shards of a run, from its driver.

    Args:
        directory: of the run's episodes, the same path on every node; places: from ``place``.
        storage: URI of the copies, or None; the rest as in ``ReplayShard``.
    """

    def __init__(
        self,
        directory: Path,
        columns: dict[str, Any],
        codec: Any,
        places: dict[str, str],
        *,
        storage: str | None = None,
        segment_bytes: int = 64 * 2**20,
        capacity_bytes: int | None = None,
        seal_s: float = 60.0,
    ):
        self.nodes = list(places.values())
        self.actors: list[Any] = []
        share = None if capacity_bytes is None else capacity_bytes // len(places)
        for name, node in places.items():
            uri = storage if storage is None else f"{storage.rstrip('/')}/{name}".rstrip("/")
            # The embedded one is where the run directory is. The others are where their disks are, and begin again
            # elsewhere, from the storage, only when that node is gone. (A soft NodeAffinity places actors anywhere.)
            options: dict[str, Any] = {"label_selector": {"ray.io/node-id": node}}
            if name:
                options["fallback_strategy"] = [{"label_selector": {}}]
            self.actors.append(
                ray.remote(ReplayShard)
                .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, **options)
                .remote(str(directory / name), uri, columns_to_json(columns), codec, segment_bytes, share, seal_s)
            )
        self.ask("where")  # a broken store speaks up here

    def places(self) -> list[tuple[str, Any]]:
        """(node, actor) of each shard, for collectors to choose the nearest."""
        return list(zip(self.nodes, self.actors))

    def ask(self, method: str, *args: Any) -> list[Any]:
        """Call every shard; what one raises comes as itself."""
        return _get([getattr(actor, method).remote(*args) for actor in self.actors])

    def stored(self, stream: str, first: int) -> dict[int, Played]:
        """Episodes of a stream that some shard holds, from number `first` on, by their numbers."""
        found: dict[int, Played] = {}
        for listed in self.ask("stored", stream, first):
            found |= {p[0]: p for p in listed if p[1] or p[0] not in found}  # what broke in one may be whole in another
        return found

    def settle(self) -> None:
        self.ask("settle")

    def close(self) -> None:
        """Seal and upload what is open; the actors end."""
        try:
            ray.get([actor.close.remote() for actor in self.actors], timeout=600)
        finally:
            for actor in self.actors:
                ray.kill(actor)


class ShardedReplay:
    """Sequences from all shards of a run, as if they were one `Replay`; a source for `Prefetch`.

    Each shard draws and copies its part on its own node, as many sequences as its share of the rows (of the priorities,
    of the episodes: of what the law counts), as they were when the batch before was drawn. A shard that is restarted
    has no priorities and no states any more, and goes on keeping aside what was later than `until` when this was made.

    Args:
        shards: of the run; law: arguments of `Replay` (mode, cross, held_out, ends, half_life, context, alpha,
            beta, include_incomplete); until: a ``mark`` from a checkpoint, see `Replay`.
    """

    def __init__(self, shards: Shards, until: Sequence[dict[str, Any]] | None = None, **law: Any):
        self.actors, self.law = shards.actors, tuple(sorted(law.items()))
        count = len(self.actors)
        self._until: list[Any] = [*(until or []), *[None] * count][:count]  # of each shard, for its first opening
        self._aside: list[list[str]] = [[] for _ in range(count)]  # and for those after a restart
        self._masses: dict[tuple[int, bool], list[tuple[int, float]]] = {}  # by T and held, with the last batch of such
        self._open(range(count))

    def _open(self, which: Iterable[int]) -> None:
        # A replay's number: modulo the number of shards its place, and else never used before, whoever of several
        # learners opens it again: the keys of before must not name rows of the new one.
        count, rounds = len(self.actors), 2 ** (63 - SHARD_BITS) // len(self.actors)
        asked = {
            i: self.actors[i].open_replay.remote(
                self.law, i + count * secrets.randbelow(rounds), self._until[i], self._aside[i]
            )
            for i in which
        }
        for i, aside in zip(asked, _get(list(asked.values()))):
            self._until[i], self._aside[i] = None, self._aside[i] or aside

    def _served(self, ask: Callable[[], Answer]) -> Answer:
        """What shards answer, where it needs be after those that were restarted have been told again what to serve."""
        while True:
            try:
                return ask()
            except NotOpenError:
                serve = _get([actor.serves.remote(self.law) for actor in self.actors])
                again = [i for i, serves in enumerate(serve) if not serves]
                self._masses.clear()
                self._open(again)

    def _ask(self, method: str, *args: Any) -> list[Any]:
        return self._served(lambda: _get([getattr(a, method).remote(self.law, *args) for a in self.actors]))

    def __len__(self) -> int:
        """Rows that training draws from."""
        return sum(rows for rows, _ in self._ask("mass"))

    @property
    def mark(self) -> list[dict[str, Any]]:
        """JSON that tells what has arrived by now, for ``until``."""
        return self._ask("replay_mark")

    @property
    def aside_steps(self) -> int:
        """Transitions that are set aside as later than ``until``."""
        return sum(self._ask("aside_steps"))

    def release(self) -> None:
        """Let what was set aside as later than ``until`` be sampled."""
        self._ask("release")
        self._aside = [[] for _ in self.actors]

    def sample(self, B: int, T: int, rng: np.random.Generator, out: Batch | None = None, held: bool = False) -> Batch:
        """B sequences of T rows, into `out`'s tensors where given. Raises ValueError where there is nothing to draw."""
        try:
            return self._served(lambda: self._sample(B, T, rng, out, held))
        except ValueError:  # a shard that began again, or has evicted since, has less than it said
            self._masses.pop((T, held), None)
            return self._served(lambda: self._sample(B, T, rng, out, held))

    def _sample(self, B: int, T: int, rng: np.random.Generator, out: Batch | None, held: bool) -> Batch:
        known = self._masses.get((T, held))
        if not known or not all(rows for rows, _ in known):  # those that had nothing may have something now
            known = self._masses[T, held] = self._ask("mass", T, held)
        rows, masses = zip(*known)
        counts = allot(B, masses, rng)
        density = sum(rows) / sum(masses) if dict(self.law).get("mode") == "prioritized" else None
        seeds = rng.integers(2**63, size=len(self.actors)).tolist()
        asked = {
            i: actor.sample.remote(self.law, int(count), T, seed, held, density)
            for i, (actor, count, seed) in enumerate(zip(self.actors, counts, seeds))
            if count
        }
        parts = []
        for i, (batch, mass) in zip(asked, _get(list(asked.values()))):
            known[i] = mass
            parts.append(Batch.of(*batch))
        return merge(parts, out)

    def update(self, keys: np.ndarray, priorities: np.ndarray) -> None:
        """Give the sequences of a batch their priorities (N,); returns at once. See `Replay.update`."""
        at = shards_of(keys) % len(self.actors)
        for i, actor in enumerate(self.actors):
            if (ours := at == i).any():
                actor.update.remote(self.law, keys[ours], priorities[ours])

    def write(self, keys: np.ndarray, states: Mapping[str, np.ndarray]) -> None:
        """Keep what a model knows after rows (N,), arrays (N, *); returns at once. See `Replay.write`."""
        at = shards_of(keys) % len(self.actors)
        for i, actor in enumerate(self.actors):
            if (ours := at == i).any():
                actor.write.remote(self.law, keys[ours], {name: array[ours] for name, array in states.items()})


def _get(refs: Any) -> Any:
    """`ray.get`, with what an actor raised as itself."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, (ValueError, OSError, NotOpenError)) else error from None


def read(actors: Sequence[Any], ids: Iterable[str], codec: Any) -> tuple[list[Episode], list[EpisodeStore]]:
    """Episodes from the shards, those on this node by mapping their segments; and the stores to close afterwards."""
    node, wanted = ray.get_runtime_context().get_node_id(), dict.fromkeys(ids)
    episodes: list[Episode] = []
    opened: list[EpisodeStore] = []
    for actor in actors:
        if not wanted:
            break
        at, path = ray.get(actor.where.remote())
        if at == node:
            opened.append(EpisodeStore(Path(path), codec=codec, read_only=True))
            found = opened[-1].readable(wanted)
        else:
            found, left = [], list(wanted)
            while left:
                block, count = ray.get(actor.read.remote(left))
                found += from_block(block) if block is not None else []
                left = left[count:]
        episodes += found
        for episode in found:
            del wanted[episode.id]
    return episodes, opened
