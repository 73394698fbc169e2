"""The replay of a run as Ray actors: one shard of it on each node that stores, around an episode store."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from raywm.checkpoint import atomic_write_json
from raywm.data.batch import Batch
from raywm.data.episode import Episode, from_block, join
from raywm.data.mirror import Mirror
from raywm.data.replay import Replay
from raywm.data.shards import allot, merge, shards_of
from raywm.data.store import EpisodeStore
from raywm.loops.parts import Played, stored

SYNC_S = 1.0  # how often a shard looks for segments to seal and to upload
Law = tuple[tuple[str, Any], ...]  # arguments of a `Replay`, sorted: a law by which samples are drawn
READ_BYTES = 64 * 2**20  # of episodes in one answer to a reader on another node


class ReplayShard:
    """One shard: appends what collectors hand it to local disk, and copies sealed segments to `storage`.

    Every method may be repeated: a duplicate changes nothing, so calls lost with this actor are simply made again. A
    shard that is restarted, on this node or another, fetches from `storage` what its disk lacks.

    Args:
        path: its directory on the node it runs on; storage: a URI, or None.
        columns, codec: of the environment; segment_bytes, capacity_bytes: of the ``EpisodeStore``.
        seal_s: an open segment is sealed, and so uploaded, at the latest after this many seconds.
    """

    def __init__(
        self,
        path: str,
        storage: str | None,
        columns: dict[str, Any],
        codec: Any,
        segment_bytes: int,
        capacity_bytes: int | None,
        seal_s: float,
    ):
        self.path, self.storage, self.columns, self.codec = Path(path), storage, columns, codec
        self.segment_bytes, self.capacity_bytes, self.seal_s = segment_bytes, capacity_bytes, seal_s
        self._store: EpisodeStore | None = None
        self._mirror: Mirror | None = None
        self._syncing = threading.Lock()
        self._closed = threading.Event()
        self._began: tuple[int, float] = 0, 0.0  # the open segment's number, and since when it holds something
        self.uploaded: dict[str, int] = {}
        self._replays: dict[Law, Replay] = {}
        self._buffers: dict[tuple[int, int], Batch] = {}
        self.trouble: str | None = None  # of the last upload

    @property
    def store(self) -> EpisodeStore:
        """Opened by the first call and not by the constructor, whose errors Ray would not pass on as themselves."""
        if self._store is None:
            self._store = self._open()
            if self.storage or self.seal_s:
                threading.Thread(target=self._watch, daemon=True, name="shard-sync").start()
        return self._store

    def _open(self) -> EpisodeStore:
        self.path.mkdir(parents=True, exist_ok=True)
        arguments: dict[str, Any] = {"segment_bytes": self.segment_bytes, "capacity_bytes": self.capacity_bytes}
        if self.storage is None:
            return EpisodeStore(self.path, self.columns, self.codec, **arguments)
        self._mirror = Mirror(self.storage)
        self._mirror.restore(self.path, self.capacity_bytes)
        store = EpisodeStore(self.path, self.columns, self.codec, **arguments)
        if store.set_aside:  # damaged here, perhaps whole there
            store.close()
            self._mirror.restore(self.path, self.capacity_bytes)
            store = EpisodeStore(self.path, self.columns, self.codec, **arguments)
        self.uploaded = self._mirror.names()
        return store

    # ----------------------------------------------------------------------------------------- what collectors say

    def add(self, block: pa.Table) -> int:
        """Append a block of pieces; it is acknowledged when this returns."""
        return self.store.add(block)

    def mark(self, id: str, info: dict[str, Any]) -> None:
        """Keep a broken episode out."""
        self.store.mark(id, info)

    # ----------------------------------------------------------------------------------------- what the run asks

    def stored(self, stream: str, first: int) -> list[Played]:
        """Which episodes of a stream are here, from number `first` on."""
        return stored(self.store, stream, first)

    def which(self, stream: str, numbers: Sequence[int]) -> list[Played]:
        """Which of these episodes of a stream are here."""
        return stored(self.store, stream, numbers=numbers)

    def streams(self) -> set[str]:
        """What the ids of its episodes begin with, up to their numbers."""
        return {id.rpartition("-")[0] for id in self.store.ids()}

    # ----------------------------------------------------------------------------------------- sampling

    def open_replay(self, law: Law, shard: int, until: dict[str, Any] | None = None) -> None:
        """Begin to serve samples by a law (see `ShardedReplay`); `until`: see `Replay`."""
        self._replays[law] = Replay(self.store, self.codec, shard=shard, until=until, **dict(law))

    def _replay(self, law: Law, shard: int) -> Replay:
        if law not in self._replays:  # this actor was restarted since
            self.open_replay(law, shard)
        return self._replays[law]

    def mass(self, law: Law, shard: int) -> tuple[int, float]:
        """Rows that can be drawn, and what they weigh against those of other shards."""
        replay = self._replay(law, shard)
        return len(replay), replay.mass

    def sample(
        self, law: Law, shard: int, B: int, T: int, seed: int, held: bool, density: float | None
    ) -> tuple[dict[str, np.ndarray], list[str], np.ndarray | None, tuple[int, float]]:
        """B sequences of T rows: arrays by the names of `Batch.tensors`, which travel without pickling; ids, keys and
        the new ``mass``."""
        replay, buffer = self._replay(law, shard), self._buffers.get((B, T))
        batch = replay.sample(B, T, np.random.default_rng(seed), out=buffer, held=held, density=density)
        self._buffers = {(B, T): batch}  # what is returned is copied into the object store, and this is filled again
        arrays = {name: tensor.numpy() for name, tensor in batch.tensors().items()}
        return arrays, batch.ids, batch.keys, (len(replay), replay.mass)

    def update(self, law: Law, shard: int, keys: np.ndarray, priorities: np.ndarray) -> None:
        """See `Replay.update`."""
        self._replay(law, shard).update(keys, priorities)

    def replay_mark(self, law: Law, shard: int) -> dict[str, Any]:
        """See `Replay.mark`."""
        return self._replay(law, shard).mark

    def release(self, law: Law, shard: int) -> None:
        """See `Replay.release`."""
        self._replay(law, shard).release()

    # ----------------------------------------------------------------------------------------- reading

    def where(self) -> tuple[str, str]:
        """Node and path, for readers that can map the segments themselves."""
        return ray.get_runtime_context().get_node_id(), str(self.store.path)

    def read(self, ids: Sequence[str]) -> tuple[pa.Table | None, int]:
        """As many of these episodes, from the first on, as fit in one answer; and how many ids it went through."""
        episodes: list[Episode] = []
        size = 0
        for count, id in enumerate(ids):
            episodes += self.store.readable([id])
            size += sum(c.nbytes for c in episodes[-1].columns().values()) if episodes else 0
            if size > READ_BYTES:
                return join(episodes), count + 1
        return (join(episodes) if episodes else None), len(ids)

    def stats(self) -> dict[str, Any]:
        """What it holds, and how far its uploads are."""
        store = self.store
        sealed = store.segments()
        return {
            "episodes": len(store),
            "steps": store.steps,
            "broken": len(store.broken),
            "bytes": store.bytes,
            "segments": len(sealed),
            "to_upload": sum(p.name not in self.uploaded for p in sealed) if self.storage else 0,
            "trouble": self.trouble,
            "set_aside": list(store.set_aside),
        }

    def verify(self) -> dict[str, Any]:
        """Hold every byte against its CRC; see `EpisodeStore.verify`."""
        return self.store.verify()

    def settle(self) -> None:
        """Bring what was written onto the disk, and to `storage`."""
        self.store.seal()
        if self._mirror is not None:
            self._sync()

    def close(self) -> None:
        self._closed.set()
        self.settle()
        self.store.close()

    # ----------------------------------------------------------------------------------------- copies

    def _watch(self) -> None:
        """Seal what has been open for long, and upload what is sealed, until the end of this process."""
        while not self._closed.wait(SYNC_S):
            try:
                self._seal_the_old()
                if self._mirror is not None:
                    self._sync()
                    self.trouble = None
            except Exception as error:  # the storage may be away for a while: `stats` says so, and it is tried again
                self.trouble = f"{type(error).__name__}: {error}"

    def _seal_the_old(self) -> None:
        number, since = self._began
        with self.store.lock:
            last = self.store.opened()
            if last is None:
                return
            if last != number:
                self._began = last, time.monotonic()
            elif time.monotonic() - since > self.seal_s:
                self.store.seal()

    def _sync(self) -> None:
        assert self._mirror is not None
        with self._syncing:
            sealed = {path.name: path for path in self.store.segments()}
            for name, path in sealed.items():
                if name not in self.uploaded and path.exists():
                    self._mirror.upload(path)
                    self.uploaded[name] = path.stat().st_size
            if self.capacity_bytes is not None:  # what was evicted here goes there too
                gone = set(self.uploaded) - set(sealed)
                self._mirror.remove(gone)
                for name in gone:
                    del self.uploaded[name]


def place(directory: Path, on_nodes: bool) -> dict[str, str]:
    """Which shards a run has, by the name of their directory, and the id of the node where each belongs.

    Either the embedded one, in `directory` itself on this node; or one on each node with CPUs. Those that an earlier
    start of the run had stay, on the node that has their disk if it is still there: `directory`/shards.json knows.
    """
    here = ray.get_runtime_context().get_node_id()
    if not on_nodes:
        return {"": here}
    nodes = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")}
    free = sorted(nodes, key=lambda node: (node != here, node))
    record = directory / "shards.json"
    before: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    places: dict[str, str] = {}
    for name, address in before.items():
        places[name] = next((n for n in free if nodes[n] == address), "")
        free = [n for n in free if n != places[name]]
    for index, name in enumerate(name for name, node in places.items() if not node):
        places[name] = list(nodes)[index % len(nodes)]
    for node in free:
        if node not in places.values():
            places[f"shard-{len(places):03d}"] = node
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
                .remote(str(directory / name), uri, columns, codec, segment_bytes, share, seal_s)
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
        return {played[0]: played for listed in self.ask("stored", stream, first) for played in listed}

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
    of the episodes: of what the law counts), as they were when the batch before was drawn.

    Args:
        shards: of the run; law: arguments of `Replay` (mode, cross, held_out, ends, half_life, alpha, beta,
            include_incomplete); until: a ``mark`` from a checkpoint, see `Replay`.
    """

    def __init__(self, shards: Shards, until: Sequence[dict[str, Any]] | None = None, **law: Any):
        self.actors, self.law = shards.actors, tuple(sorted(law.items()))
        marks: list[Any] = list(until or [])
        marks += [None] * (len(self.actors) - len(marks))
        opened = [a.open_replay.remote(self.law, i, m) for i, (a, m) in enumerate(zip(self.actors, marks))]
        _get(opened)
        self._masses: list[tuple[int, float]] = []

    def _ask(self, method: str, *args: Any) -> list[Any]:
        return _get([getattr(a, method).remote(self.law, i, *args) for i, a in enumerate(self.actors)])

    def __len__(self) -> int:
        """Rows that training draws from."""
        self._masses = self._ask("mass")
        return sum(rows for rows, _ in self._masses)

    @property
    def mark(self) -> list[dict[str, Any]]:
        """JSON that tells what has arrived by now, for ``until``."""
        return self._ask("replay_mark")

    def release(self) -> None:
        """Let what was set aside as later than ``until`` be sampled."""
        self._ask("release")

    def sample(self, B: int, T: int, rng: np.random.Generator, out: Batch | None = None, held: bool = False) -> Batch:
        """B sequences of T rows, into `out`'s tensors where given. Raises ValueError where there is nothing to draw."""
        if not self._masses or not sum(mass for _, mass in self._masses):
            self._masses = self._ask("mass")
        rows, masses = zip(*self._masses)
        counts = allot(B, masses, rng)
        density = sum(rows) / sum(masses) if dict(self.law).get("mode") == "prioritized" else None
        seeds = rng.integers(2**63, size=len(self.actors)).tolist()
        asked = {
            i: actor.sample.remote(self.law, i, int(count), T, seed, held, density)
            for i, (actor, count, seed) in enumerate(zip(self.actors, counts, seeds))
            if count
        }
        parts = []
        for i, (arrays, ids, keys, mass) in zip(asked, _get(list(asked.values()))):
            self._masses[i] = mass
            parts.append(Batch.of(arrays, ids, keys))
        return merge(parts, out)

    def update(self, keys: np.ndarray, priorities: np.ndarray) -> None:
        """Give the sequences of a batch their priorities (N,); returns at once. See `Replay.update`."""
        for i, actor in enumerate(self.actors):
            ours = shards_of(keys) == i
            if ours.any():
                actor.update.remote(self.law, i, keys[ours], priorities[ours])


def _get(refs: Any) -> Any:
    """`ray.get`, with what an actor raised as itself."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, (ValueError, OSError)) else error from None


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
