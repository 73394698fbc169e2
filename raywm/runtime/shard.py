"""One shard of a run's replay as a Ray actor, around an episode store.

Importing this module does not import torch, which comes with the store: collectors import it with the shard's handle.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from raywm.data.episode import Episode, join
from raywm.spaces import columns_from_json

if TYPE_CHECKING:
    from raywm.data.batch import Batch
    from raywm.data.mirror import Mirror
    from raywm.data.replay import Replay
    from raywm.data.store import EpisodeStore
    from raywm.loops.parts import Played

SYNC_S = 1.0  # how often a shard looks for segments to seal and to upload
TRIES = 5  # of the storage, with pauses of 1, 2, 4 and 8 s
READ_BYTES = 64 * 2**20  # of episodes in one answer to a reader on another node
Law = tuple[tuple[str, Any], ...]  # arguments of a `Replay`, sorted: a law by which samples are drawn


class NotOpenError(LookupError):
    """A shard serves no samples by such a law: it was restarted since it was told to. ``open_replay`` again."""


class ReplayShard:
    """One shard: appends what collectors hand it to local disk, and copies sealed segments to `storage`.

    Every method may be repeated: a duplicate changes nothing, so calls lost with this actor are simply made again. A
    shard that is restarted, on this node or another, fetches from `storage` what its disk lacks. That may take long:
    meanwhile it takes what collectors add and answers from what it has, and what must know all waits.

    Args:
        path: its directory on the node it runs on; storage: a URI, or None.
        columns (as ``columns_to_json`` gives them, so that a restart finds its arguments) and
            codec: of the environment; segment_bytes, capacity_bytes: of the ``EpisodeStore``.
        seal_s: an open segment is sealed, and so uploaded, at the latest after this many seconds.
    """

    def __init__(
        self,
        path: str,
        storage: str | None,
        columns: Mapping[str, Any],
        codec: Any,
        segment_bytes: int,
        capacity_bytes: int | None,
        seal_s: float,
    ):
        self.path, self.storage, self.columns, self.codec = Path(path), storage, columns_from_json(columns), codec
        self.segment_bytes, self.capacity_bytes, self.seal_s = segment_bytes, capacity_bytes, seal_s
        self._store: EpisodeStore | None = None
        self._mirror: Mirror | None = None
        self._syncing = threading.Lock()  # held while copies are made, and while the store is exchanged
        self._restoring: threading.Thread | None = None
        self._failed: Exception | None = None  # the last restoring
        self._fetched: set[str] = set()  # segments; one that is damaged in the storage as well is not fetched for ever
        self._closed = threading.Event()
        self._began: tuple[int, float] = 0, 0.0  # the open segment's number, and since when it holds something
        self.uploaded: dict[str, int] = {}
        self._replays: dict[Law, Replay] = {}
        self._buffers: dict[tuple[int, int], Batch] = {}
        self.trouble: str | None = None  # of the last upload
        if storage or seal_s:
            threading.Thread(target=self._watch, daemon=True, name="shard-sync").start()

    @property
    def store(self) -> EpisodeStore:
        """Opened by the first call and not by the constructor, whose errors Ray would not pass on as themselves; and
        again once all has been fetched from the storage."""
        if self._store is None:
            self._store = self._open()
        elif self._restoring is not None and not self._restoring.is_alive():
            with self._syncing:
                before, self._store, self._restoring = self._store, None, None
                before.close()
                self._replays.clear()  # they go by the order in which a store has its rows
                self._store = self._open()
        return self._store

    def _whole(self) -> EpisodeStore:
        """The store, with all that is to be fetched. Raises OSError where that cannot be."""
        store = self.store
        while self._restoring is not None:
            self._restoring.join()
            if self._failed is not None:
                raise self._failed
            store = self.store
        return store

    def _open(self) -> EpisodeStore:
        from raywm.data.mirror import Mirror
        from raywm.data.store import EpisodeStore

        self.path.mkdir(parents=True, exist_ok=True)
        arguments: dict[str, Any] = {"segment_bytes": self.segment_bytes, "capacity_bytes": self.capacity_bytes}
        if self.storage is None:
            return EpisodeStore(self.path, self.columns, self.codec, **arguments)
        self._mirror = Mirror(self.storage)
        store = EpisodeStore(self.path, self.columns, self.codec, after=self._mirror.newest(), **arguments)
        self.uploaded = self._mirror.names()
        for name in set(store.set_aside) & set(self.uploaded) - self._fetched:  # damaged here, perhaps whole there
            (self.path / name).unlink(missing_ok=True)  # what could be saved of it: this store has it mapped
        if set(self._mirror.lacking(self.path, self.capacity_bytes)) - self._fetched:
            self._failed = None
            self._restoring = threading.Thread(target=self._restore, daemon=True, name="shard-restore")
            self._restoring.start()
        return store

    def _restore(self) -> None:
        assert self._mirror is not None
        for attempt in range(TRIES):
            try:
                self._fetched.update(self._mirror.restore(self.path, self.capacity_bytes))
                return
            except Exception as error:  # the storage may be away for a moment
                if attempt + 1 == TRIES:
                    self._failed = error
                else:
                    time.sleep(2.0**attempt)

    # ----------------------------------------------------------------------------------------- what collectors say

    def add(self, block: pa.Table) -> int:
        """Append a block of pieces; it is acknowledged when this returns."""
        return self.store.add(block, strict=False)

    def mark(self, id: str, info: dict[str, Any]) -> None:
        """Keep a broken episode out."""
        self.store.mark(id, info)

    # ----------------------------------------------------------------------------------------- what the run asks

    def stored(self, stream: str, first: int) -> list[Played]:
        """Which episodes of a stream are here, from number `first` on."""
        from raywm.loops.parts import stored

        return stored(self._whole(), stream, first)

    def which(self, stream: str, numbers: Sequence[int]) -> list[Played]:
        """Which of these episodes of a stream are here by now: one that is still to be fetched may be played twice."""
        from raywm.loops.parts import stored

        return stored(self.store, stream, numbers=numbers)

    def streams(self) -> set[str]:
        """What the ids of its episodes begin with, up to their numbers."""
        return {id.rpartition("-")[0] for id in self._whole().ids()}

    # ----------------------------------------------------------------------------------------- sampling

    def open_replay(
        self, law: Law, number: int, until: dict[str, Any] | None = None, aside: Sequence[str] = ()
    ) -> list[str]:
        """Begin to serve samples by a law (see `ShardedReplay`); number, until, aside: see `Replay`.

        Returns what is set aside now: if this actor is restarted, that again is not to be sampled, and what has arrived
        since the first opening is.
        """
        from raywm.data.replay import Replay

        replay = Replay(self.store, self.codec, shard=number, until=until, aside=aside, **dict(law))
        self._replays[law] = replay
        return replay.aside

    def serves(self, law: Law) -> bool:
        """Whether ``open_replay`` was called for a law and this actor not restarted since."""
        return law in self._replays

    def _replay(self, law: Law) -> Replay:
        if law not in self._replays:
            raise NotOpenError(law)
        return self._replays[law]

    def mass(self, law: Law, T: int = 1, held: bool = False) -> tuple[int, float]:
        """Rows that can be drawn, and what they weigh against those of other shards; nothing where that is too few."""
        return self._weigh(self._replay(law), T, held)

    def _weigh(self, replay: Replay, T: int, held: bool) -> tuple[int, float]:
        rows = replay.held_rows if held else len(replay)
        if not rows or (replay.cross and rows < T):
            return 0, 0.0
        return rows, float(rows) if held else replay.mass

    def sample(
        self, law: Law, B: int, T: int, seed: int, held: bool, density: float | None
    ) -> tuple[tuple[Any, ...], tuple[int, float]]:
        """B sequences of T rows: the arguments of `Batch.of`, whose arrays travel without pickling; and the new
        ``mass``."""
        replay, buffer = self._replay(law), self._buffers.get((B, T))
        batch = replay.sample(B, T, np.random.default_rng(seed), out=buffer, held=held, density=density)
        self._buffers = {(B, T): batch}  # what is returned is copied into the object store, and this is filled again
        arrays = {name: tensor.numpy() for name, tensor in batch.tensors().items()}
        stored = None
        if batch.stored is not None and batch.known is not None:
            stored = {name: tensor.numpy() for name, tensor in batch.stored.items()}, batch.known.numpy()
        return (arrays, batch.ids, batch.keys, batch.rows, stored), self._weigh(replay, T, held)

    def write(self, law: Law, keys: np.ndarray, states: dict[str, np.ndarray]) -> None:
        """See `Replay.write`; after a restart these are keys of before, and passed over."""
        if law in self._replays:
            self._replays[law].write(keys, states)

    def update(self, law: Law, keys: np.ndarray, priorities: np.ndarray) -> None:
        """See `Replay.update`; after a restart these are keys of before, and passed over."""
        if law in self._replays:
            self._replays[law].update(keys, priorities)

    def replay_mark(self, law: Law) -> dict[str, Any]:
        """See `Replay.mark`."""
        return self._replay(law).mark

    def aside_steps(self, law: Law) -> int:
        """See `Replay.aside_steps`."""
        return self._replay(law).aside_steps

    def release(self, law: Law) -> None:
        """See `Replay.release`."""
        self._replay(law).release()

    # ----------------------------------------------------------------------------------------- reading

    def where(self) -> tuple[str, str]:
        """Node and path, for readers that can map the segments themselves."""
        return ray.get_runtime_context().get_node_id(), str(self._whole().path)

    def read(self, ids: Sequence[str]) -> tuple[pa.Table | None, int]:
        """As many of these episodes, from the first on, as fit in one answer; and how many ids it went through."""
        episodes: list[Episode] = []
        store, size = self._whole(), 0
        for count, id in enumerate(ids):
            found = store.readable([id])
            episodes += found
            size += sum(column.nbytes for episode in found for column in episode.columns().values())
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
            "latent_bytes": sum(replay.latent_bytes for replay in self._replays.values()),  # in memory
            "segments": len(sealed),
            "to_upload": sum(p.name not in self.uploaded for p in sealed) if self.storage else 0,
            "trouble": self.trouble if self._failed is None else str(self._failed),
            "set_aside": list(store.set_aside),
        }

    def verify(self) -> dict[str, Any]:
        """Hold every byte against its CRC; see `EpisodeStore.verify`."""
        return self._whole().verify()

    def settle(self) -> None:
        """Bring what was written onto the disk, and to `storage`."""
        self.store.seal()
        for attempt in range(TRIES if self._mirror is not None else 0):
            try:
                return self._sync()
            except OSError:  # the storage may be away for a moment
                if attempt + 1 == TRIES:
                    raise
                time.sleep(2.0**attempt)

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
                self._sync()
                self.trouble = None
            except Exception as error:  # the storage may be away for a while: `stats` says so, and it is tried again
                self.trouble = f"{type(error).__name__}: {error}"

    def _seal_the_old(self) -> None:
        number, since = self._began
        with self._syncing:
            store = self._store
            if store is None:
                return
            with store.lock:
                last = store.opened()
                if last is None:
                    return
                if last != number:
                    self._began = last, time.monotonic()
                elif time.monotonic() - since > self.seal_s:
                    store.seal()

    def _sync(self) -> None:
        with self._syncing:
            if self._mirror is None or self._store is None:
                return
            sealed = {path.name: path for path in self._store.segments()}
            for name, path in sealed.items():
                if name not in self.uploaded and path.exists():
                    self._mirror.upload(path)
                    self.uploaded[name] = path.stat().st_size
            if self.capacity_bytes is not None and self._restoring is None:  # what was evicted here goes there too
                gone = set(self.uploaded) - set(sealed)
                self._mirror.remove(gone)
                for name in gone:
                    del self.uploaded[name]
