"""The replay of a run as Ray actors: one shard of it on each node that stores, around an episode store."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raywm.checkpoint import atomic_write_json
from raywm.data.episode import Episode, from_block, join
from raywm.data.mirror import Mirror
from raywm.data.store import EpisodeStore
from raywm.loops.parts import Played, stored

SYNC_S = 1.0  # how often a shard looks for segments to seal and to upload
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
            # the embedded one is where the run directory is; the others may begin again elsewhere, from the storage
            strategy = NodeAffinitySchedulingStrategy(node, soft=bool(name))
            self.actors.append(
                ray.remote(ReplayShard)
                .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=strategy)
                .remote(str(directory / name), uri, columns, codec, segment_bytes, share, seal_s)
            )
        self.ask("where")  # a broken store speaks up here

    def places(self) -> list[tuple[str, Any]]:
        """(node, actor) of each shard, for collectors to choose the nearest."""
        return list(zip(self.nodes, self.actors))

    def ask(self, method: str, *args: Any) -> list[Any]:
        """Call every shard; what one raises comes as itself."""
        try:
            return ray.get([getattr(actor, method).remote(*args) for actor in self.actors])
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, (ValueError, OSError)) else error from None

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
