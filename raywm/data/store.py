"""The one episode store: append-only Arrow segments on local disk, FIFO by bytes.

A piece is acknowledged (``add`` returns) once its bytes are with the operating system, so it survives kill -9 of the
process. Sealed segments are fsynced and survive the machine. The page cache is the RAM tier: what is kept in memory
is the index and, of the one open segment, the pieces that were read.
"""

from __future__ import annotations

import dataclasses
import os
import re
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import pyarrow as pa

from raywm.data.batch import Batch
from raywm.data.episode import (
    FLAGS,
    Episode,
    cut,
    from_columns,
    piece_header,
    table_meta,
    to_block,
    to_table,
    validate,
    validate_block,
)
from raywm.data.lineage import lineage, lock
from raywm.data.segment import NAME, DamagedError, Piece, Segment, sealed_name, walk_pieces
from raywm.data.snapshot import Snapshot, draw, gather
from raywm.spaces import ActionCodec

__all__ = ["DamagedError", "EpisodeStore", "Snapshot"]

READ_TRIES = 50  # of opening what another process is writing


@dataclass(eq=False, slots=True)
class _Entry:
    """An episode in the index."""

    pieces: list[Piece] = field(default_factory=list)
    rows: int = 0
    complete: bool = False


class Listener(Protocol):
    """Who hears of what comes and goes (``EpisodeStore.watch``), with the store's lock held."""

    def added(self, id: str, rows: int, last: bool) -> None:
        """The next piece of an episode, of so many rows."""

    def dropped(self, id: str) -> None:
        """An episode, complete or not, is no longer served: evicted, damaged, broken or begun again."""


class EpisodeStore:
    """Episodes on local disk, in a directory that one process writes at a time.

    `columns` and `codec`, where given, are what every episode is held against; `codec` is needed to make batches.
    `capacity_bytes`: whole sealed segments are evicted, oldest first, beyond it. `read_only` opens a directory that
    another process may be writing, as it is now, and changes nothing in it. `after`: new segments get higher numbers,
    those of a storage that are not here.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        columns: Mapping[str, gym.spaces.Box] | None = None,
        codec: ActionCodec | None = None,
        segment_bytes: int = 64 * 2**20,
        capacity_bytes: int | None = None,
        read_only: bool = False,
        after: int = 0,
    ):
        if segment_bytes < 1 or (capacity_bytes is not None and capacity_bytes < 1):
            raise ValueError(f"segment_bytes={segment_bytes}, capacity_bytes={capacity_bytes}: expected at least 1")
        self.path, self.columns, self.codec = Path(path), columns, codec
        self.capacity_bytes, self.read_only, self.after = capacity_bytes, read_only, after
        # Eviction is by whole segments: a few of them must fit, or it would empty the store.
        self.segment_bytes = segment_bytes if capacity_bytes is None else min(segment_bytes, capacity_bytes // 4 + 1)
        self.set_aside: list[str] = []  # names of damaged files, of this opening
        self.lock: Any = threading.RLock()  # held while anything is added, looked up or told to listeners
        self.rows = 0  # of the complete episodes
        self._entries: dict[str, _Entry] = {}
        self._complete = 0
        self._sorted: tuple[list[str], np.ndarray] | None = None  # complete ids and the running total of their rows
        self._marks: dict[str, Piece] = {}  # of broken episodes
        self._said: set[str] = set()  # of damaged blocks: once each, though they have many episodes
        self._listeners: list[Listener] = []
        # Incomplete episodes whose first pieces are gone, for what comes of their rest. Not kept on disk: a restart
        # takes the collectors of this process with it, and those of others are not `strict`.
        self._dropped: set[str] = set()
        self._segments: list[Segment] = []
        self._schema: pa.Schema | None = None
        self._file_lock: int | None = None
        self._lineage: str | None = None
        self._closed = False
        if not read_only:
            self.path.mkdir(parents=True, exist_ok=True)
            self._file_lock = lock(self.path)
            self._lineage = lineage(self._file_lock)
        elif not self.path.is_dir():
            raise ValueError(f"there is no store at {self.path}, expected a directory; collect into it first")
        try:
            self._open(tries=READ_TRIES if read_only else 1)
        except BaseException:
            self._release()
            raise

    # Opening

    def _open(self, tries: int) -> None:
        """Whoever writes here may seal or evict a file between the listing and its opening: then list again."""
        for left in reversed(range(tries)):
            try:
                return self._load()
            except FileNotFoundError:
                if not left:
                    raise
                self._segments, self._schema, self.set_aside = [], None, []
                time.sleep(0.01)

    def _load(self) -> None:
        found = sorted((match.group(1), name) for name in os.listdir(self.path) if (match := NAME.fullmatch(name)))
        for number, name in found:
            path, is_open = self.path / name, ".open." in name
            try:
                segment = Segment.load(path, int(number), is_open)
                if self._schema is not None and segment.pieces and segment.schema != self._schema:
                    raise DamagedError(f"its columns are {_names(segment.schema)}, not {_names(self._schema)}")
            except DamagedError as error:
                rest = self._put_aside(path, error)
                if rest is None:
                    continue
                segment, is_open = rest, False
            if not is_open and not segment.ended and name not in self.set_aside:
                warnings.warn(
                    f"{path} has no end mark: pieces at its end may be missing; the rest is served", stacklevel=3
                )
            if segment.schema is not None and segment.pieces:
                self._check_schema(segment.schema)
            if is_open and not self.read_only:
                segment = self._recover(segment)
            if segment.pieces:
                self._segments.append(segment)
            else:
                segment.close()
        self._arrange()

    def _recover(self, segment: Segment) -> Segment:
        """The open segment of a process that is no more: cut off what it did not finish writing, and seal it."""
        cut = segment.path.stat().st_size - segment.end
        if not segment.pieces:
            segment.close()
            segment.path.unlink()  # nothing in it was ever acknowledged
            return segment
        if cut > 8:  # more than an end mark
            warnings.warn(f"{segment.path}: cut off {cut} bytes of a piece that was not written whole", stacklevel=4)
        segment.close()
        segment.seal()
        return segment

    def _put_aside(self, path: Path, error: DamagedError) -> Segment | None:
        """Rename a damaged file; the blocks of it that are whole, as a segment in its place."""
        self.set_aside.append(path.name)
        aside = path.with_name(path.name + ".damaged")
        rest = error.rest if error.rest is not None and error.rest.pieces else None
        if rest is not None and self._schema is not None and rest.schema != self._schema:
            rest = None
        if self.read_only:
            kept = f"only the {len(rest.pieces)} pieces before or beside it are" if rest else "not"
            warnings.warn(f"{path} is damaged, {kept} read: {error}", stacklevel=4)
            return rest
        n = 1
        while aside.exists():
            n, aside = n + 1, path.with_name(f"{path.name}.{n}.damaged")
        if rest is not None:
            rest.save(part := path.with_name(f"{path.name}.part"))
        os.rename(path, aside)
        kept = f"; the {len(rest.pieces)} pieces in it that are whole are kept" if rest else ""
        warnings.warn(f"{path} is damaged and set aside as {aside.name}: {error}{kept}", stacklevel=4)
        if rest is None:
            return None
        sealed = path.with_name(sealed_name(path.name))
        os.replace(part, sealed)
        rest.close()
        return Segment.load(sealed, rest.number, False)

    def _check_schema(self, schema: pa.Schema) -> None:
        """The first segment decides, unless columns and codec did; a store of another environment is a mistake."""
        if self._schema is not None:
            return
        types = {f.name: f.type for f in schema}
        for name, expected in _types(self.columns, self.codec).items():
            if types.get(name) != expected:
                raise ValueError(
                    f"the store at {self.path} has column {name!r} as {types.get(name)}, expected {expected}; it was "
                    "collected in another environment: use another directory"
                )
        if self.columns is not None:
            got = sorted(n for n in types if n.startswith("obs."))
            if got != sorted(f"obs.{n}" for n in self.columns):
                raise ValueError(
                    f"the store at {self.path} has {got}, expected {sorted(self.columns)}; it was collected in another "
                    "environment: use another directory"
                )
        self._schema = schema

    # The index

    def _arrange(self) -> None:
        """Index what was found. Each lineage tells its own story of an episode; one of them is served: the last one
        that came to an end, else this directory's own, which alone can go on, else the last one."""
        lineages: dict[str, list[Segment]] = {}
        for segment in self._segments:
            lineages.setdefault(segment.lineage, []).append(segment)
        place = {segment: at for at, segment in enumerate(self._segments)}
        best: dict[str, tuple[tuple, _Entry]] = {}

        def offer(id: str, entry: _Entry) -> None:
            segment = entry.pieces[-1].block.segment
            rank = entry.complete, segment.lineage == self._lineage and not entry.complete, place[segment]
            if id not in best or rank > best[id][0]:
                best[id] = rank, entry

        for segments in lineages.values():
            for piece in walk_pieces(segments):
                before = self._entries.get(piece.id)
                if before is not None and before.complete and not piece.first_row:
                    offer(piece.id, before)  # begun again by one who did not have it, and perhaps did not end it
                self._index(piece)
            if len(lineages) == 1 and not best:
                return
            for id, entry in self._entries.items():
                offer(id, entry)
            for id, mark in self._marks.items():
                offer(id, _Entry([mark]))
            self._entries, self._marks = {}, {}
        self._entries = {id: entry for id, (_, entry) in best.items() if entry.rows}
        self._marks = {id: entry.pieces[0] for id, (_, entry) in best.items() if not entry.rows}
        whole = [entry.rows for entry in self._entries.values() if entry.complete]
        self._complete, self.rows = len(whole), sum(whole)

    def _index(self, piece: Piece) -> None:
        if not piece.rows:  # what came of it before is void
            self._forget(piece.id)
            self._marks[piece.id] = piece
            return
        entry = self._entries.get(piece.id)
        if piece.first_row == 0:
            # Begun again: by the twin of a dead worker, or after the first one was found damaged. The later one holds.
            self._forget(piece.id)
            self._marks.pop(piece.id, None)
            entry = self._entries[piece.id] = _Entry()
        if entry is None or entry.complete or piece.first_row != entry.rows:
            return  # the rest of an episode whose earlier pieces are gone
        entry.pieces.append(piece)
        entry.rows += piece.rows
        if piece.last:
            entry.complete = True
            self._complete += 1
            self.rows += entry.rows
            self._sorted = None
        for listener in self._listeners:
            listener.added(piece.id, piece.rows, piece.last)

    def _forget(self, id: str) -> None:
        entry = self._entries.pop(id, None)
        if entry is None:
            return
        if entry.complete:
            self._complete -= 1
            self.rows -= entry.rows
            self._sorted = None
        for listener in self._listeners:
            listener.dropped(id)

    def _lose(self, id: str) -> None:
        """Forget what is evicted or damaged; what may still come of it has no beginning."""
        entry = self._entries.get(id)
        if entry is not None and not entry.complete:
            self._dropped.add(id)
        self._forget(id)

    def watch(self, listener: Listener) -> None:
        """Tell `listener` of every piece that comes, those that are here first, and of every episode that goes."""
        with self.lock:
            for piece in walk_pieces(self._segments):
                entry = self._entries.get(piece.id)
                if entry is not None and piece in entry.pieces:
                    listener.added(piece.id, piece.rows, piece.last)
            self._listeners.append(listener)

    def __len__(self) -> int:
        """Complete episodes."""
        return self._complete

    @property
    def steps(self) -> int:
        """Transitions of the complete episodes."""
        return self.rows - self._complete

    @property
    def bytes(self) -> int:
        """Bytes on disk, without what is set aside."""
        return sum(segment.end for segment in self._segments)

    def ids(self) -> list[str]:
        """Ids of the complete episodes, sorted."""
        with self.lock:
            return list(self._order()[0])

    def _order(self) -> tuple[list[str], np.ndarray]:
        if self._sorted is None:
            ids = sorted(id for id, entry in self._entries.items() if entry.complete)
            rows = [self._entries[id].rows for id in ids]
            self._sorted = ids, np.cumsum(rows, dtype=np.int64)
        return self._sorted

    def known(self, id: str) -> bool:
        """Whether an episode is here, complete or marked as broken."""
        entry = self._entries.get(id)
        return id in self._marks or entry is not None and entry.complete

    @property
    def broken(self) -> dict[str, dict[str, Any]]:
        """Infos of the episodes that broke and are kept out, by id; their "broken" says why."""
        with self.lock:
            return {id: piece.block.segment.info(piece) for id, piece in self._marks.items()}

    def info(self, id: str) -> dict[str, Any]:
        """The info of a complete episode, without its rows."""
        with self.lock:
            piece = self._entry(id).pieces[-1]
            return piece.block.segment.info(piece)

    def length(self, id: str) -> tuple[int, float]:
        """Steps and return of a complete episode, from its info where that says; (0, nan) of a broken one."""
        with self.lock:
            if id in self._marks:
                return 0, float("nan")
            steps, ret = self._entry(id).rows - 1, self.info(id).get("return")
            return steps, self.get(id).ret if ret is None else float(ret)

    def segments(self) -> list[Path]:
        """The sealed files, oldest first: they do not change any more and may be copied elsewhere."""
        with self.lock:
            return [segment.path for segment in self._segments if not segment.open]

    def opened(self) -> int | None:
        """The number of the segment that is being appended to, if it holds anything."""
        with self.lock:
            last = self._segments[-1] if self._segments else None
            return last.number if last is not None and last.open and last.pieces else None

    # Writing

    def add(self, piece: Episode | pa.Table, strict: bool = True) -> int:
        """Store an episode, the next piece of one (``to_table(episode, first_row, stop)``) or a block of such pieces
        (``to_block``).

        Returns how many pieces are new, once they are with the operating system: 0 when all were here already. Raises
        ValueError for what breaks the timing rule, holds NaN or leaves a gap, and OSError when the disk is full; then
        nothing of the block is stored, and the store stays whole and usable. Not `strict`: a piece that leaves a gap
        (those before it are lost) is left out with the rest of its episode.
        """
        if isinstance(piece, Episode):
            validate(piece, self.columns, self.codec)
            try:
                table = to_table(piece)
            except (TypeError, RecursionError) as error:
                raise ValueError(f"episode {piece.id!r}: info is not JSON ({error}); store plain values") from error
        else:
            table = piece
        meta, columns = table_meta(table), from_columns(table)
        with self.lock:
            self._writable()
            validate_block(columns, meta["pieces"], self.columns, self.codec)
            fresh = self._ready(columns, meta["pieces"], strict)
            if not fresh:
                return 0
            if len(fresh) < len(meta["pieces"]):
                table, meta = _part(columns, meta, fresh), meta | {"pieces": [meta["pieces"][i] for i in fresh]}
            schema = table.schema.remove_metadata()
            if self._schema is None:
                self._schema = schema
            elif schema != self._schema:
                raise ValueError(
                    f"episode {meta['pieces'][0]['id']!r} has columns {_names(schema)}, "
                    f"expected {_names(self._schema)} as the store at {self.path} has"
                )
            segment = self._open_segment()
            pieces = segment.append(table, meta)
            for new in pieces:
                self._index(new)
            if segment.end >= self.segment_bytes:
                self.seal()
        return len(pieces)

    def mark(self, id: str, info: Mapping[str, Any]) -> None:
        """Note that an episode broke, and why (`info["broken"]`): its pieces, if any, are void from now on."""
        with self.lock:
            if self._schema is None:
                if self.columns is None or self.codec is None:
                    raise ValueError(
                        f"the store at {self.path} is empty: open it with columns and codec to mark {id!r}"
                    )
                self._schema = _schema(self.columns, self.codec)
            columns = from_columns(self._schema.empty_table())
            self.add(to_block(columns, [piece_header(id, 0, 0, True, dict(info))]))

    def _ready(self, columns: Mapping[str, np.ndarray], pieces: list[dict[str, Any]], strict: bool) -> list[int]:
        """Which pieces of a block are to be stored, once those before them are where they can be gone on with."""
        while True:
            try:
                fresh = self._new(columns, pieces, strict)
                for head in (pieces[i] for i in fresh):
                    if head["first_row"] and (entry := self._entries.get(head["id"])) is not None:
                        self._take_over(head["id"], entry)
                return fresh
            except DamagedError:
                continue  # what was stored of an episode, which is now forgotten: there is one less

    def _take_over(self, id: str, entry: _Entry) -> None:
        """Write what another lineage has of an episode again, as this one's, which is about to go on with it."""
        if entry.pieces[-1].block.segment.lineage != self._lineage:
            table = to_table(_join(self._views(id, complete=False)))
            for new in self._open_segment().append(table.replace_schema_metadata(None), table_meta(table)):
                self._index(new)

    def _new(self, columns: Mapping[str, np.ndarray], pieces: list[dict[str, Any]], strict: bool) -> list[int]:
        """Which pieces of a block are to be stored. Raises ValueError for one that leaves a gap."""
        fresh: list[int] = []
        ahead: dict[str, int] = {}  # rows of the episodes that earlier pieces of this block belong to
        at = 0
        for index, head in enumerate(pieces):
            id, first_row, start = head["id"], head["first_row"], at
            at += head["rows"]
            entry = self._entries.get(id)
            marked = id in self._marks
            if entry is not None and entry.complete and id not in ahead:
                continue  # ids are deterministic: the same episode, played again after a death
            if marked and id not in ahead and (first_row or not head["rows"]):
                continue  # marked already, or the rest of what broke; one that begins again may go well
            stored = ahead.get(id, entry.rows if entry else 0)
            if head["rows"] and id not in ahead:
                if first_row + head["rows"] <= stored and self._same(id, first_row, head["rows"], columns, start):
                    continue
                if first_row and entry is None and id in self._dropped:
                    continue
                if first_row == 0:
                    self._dropped.discard(id)
            if first_row not in (0, stored):
                if not strict:
                    self._dropped.add(id)
                    continue
                raise ValueError(
                    f"episode {id!r}: a piece begins at row {first_row}, expected {stored} (or 0, to begin again); "
                    "add its pieces in order, each once"
                )
            ahead[id] = first_row + head["rows"]
            fresh.append(index)
        return fresh

    def _same(self, id: str, first_row: int, rows: int, columns: Mapping[str, np.ndarray], start: int) -> bool:
        """Whether a piece that is sent is what is stored of an episode already."""
        stored = _join(self._views(id, complete=False)).columns()
        return all(
            np.array_equal(column[first_row : first_row + rows], columns[name][start : start + rows])
            for name, column in stored.items()
        )

    def _open_segment(self) -> Segment:
        if self._segments and self._segments[-1].open:
            return self._segments[-1]
        taken = [int(m.group(1)) for name in os.listdir(self.path) if (m := re.match(r"segment-(\d{8})", name))]
        assert self._schema is not None and self._lineage is not None
        number = max(self.after, *taken, 0) + 1
        segment = Segment.create(self.path, number, self._lineage, self._schema)
        self._segments.append(segment)
        return segment

    def seal(self) -> None:
        """Close the open segment and bring it to disk; then evict what is beyond the capacity."""
        with self.lock:
            self._writable()
            if not self._segments or not self._segments[-1].open:
                return
            segment = self._segments[-1]
            if not segment.pieces:
                self._segments.pop()
                segment.close()
                segment.path.unlink()
                return
            segment.seal()
            self._evict()

    def _evict(self) -> None:
        while self.capacity_bytes is not None and self.bytes > self.capacity_bytes and len(self._segments) > 1:
            segment = self._segments.pop(0)
            for piece in segment.pieces:
                if self._marks.get(piece.id) is piece:
                    del self._marks[piece.id]
                entry = self._entries.get(piece.id)
                if entry is not None and piece in entry.pieces:
                    self._lose(piece.id)
            segment.close()
            segment.path.unlink(missing_ok=True)

    def _writable(self) -> None:
        if self.read_only or self._closed:
            state = "closed" if self._closed else "open read-only"
            raise ValueError(f"the store at {self.path} is {state}, expected it open for writing")

    # Reading

    def _entry(self, id: str) -> _Entry:
        entry = self._entries.get(id)
        if self._closed:
            raise ValueError(f"the store at {self.path} is closed; open it again (read_only=True to read)")
        if entry is None or not entry.complete:
            raise KeyError(f"no complete episode {id!r} among the {len(self)} at {self.path}")
        return entry

    def parts(self, id: str, complete: bool = True) -> list[tuple[dict[str, np.ndarray], int, int]]:
        """Where the rows of an episode lie: of each piece its block's columns, its first row in them and its rows.

        The columns are read-only views of the disk. `complete=False` also serves what has come of one that is still
        being played. Raises KeyError for an unknown id and DamagedError (once; the episode is then forgotten) for bytes
        that are not what was written.
        """
        with self.lock:
            entry = self._entry(id) if complete or id not in self._entries else self._entries[id]
            try:
                return [(p.block.columns or p.block.segment.columns(p.block), p.start, p.rows) for p in entry.pieces]
            except DamagedError as error:
                self._damaged(id, error)
                raise

    def _damaged(self, id: str, error: Exception) -> None:
        self._lose(id)  # so that it can be collected again
        if str(error) not in self._said:
            self._said.add(str(error))
            warnings.warn(
                f"{self.path}: episode {id!r}, and others of its block, are damaged and no longer served: {error}",
                stacklevel=4,
            )

    def _views(self, id: str, complete: bool = True) -> list[Episode]:
        """The pieces of an episode; infos only where the episode is complete."""
        parts = self.parts(id, complete)
        return [cut(columns, id, start, start + rows, {}) for columns, start, rows in parts]

    def get(self, id: str) -> Episode:
        """One complete episode: read-only views of the disk (an episode stored in several pieces is a copy).

        Raises KeyError for an unknown id and DamagedError (once; the episode is then forgotten) for a wrong CRC.
        """
        with self.lock:
            views = self._views(id)
            try:
                info = self.info(id)
            except DamagedError as error:
                self._damaged(id, error)
                raise
            return dataclasses.replace(_join(views), info=info)

    def snapshot(self, ids: Iterable[str] | None = None) -> Snapshot:
        """A frozen set of episodes, ordered by id: all complete ones (but damaged ones), or exactly `ids`."""
        codec = self._codec()
        if ids is not None:
            return Snapshot([self.get(id) for id in ids], codec)
        episodes = []
        for id in self.ids():
            try:
                episodes.append(self.get(id))
            except DamagedError:
                continue  # warned about, and served no more
        return Snapshot(episodes, codec)

    def readable(self, ids: Iterable[str]) -> list[Episode]:
        """Those of `ids` that are here and whole, in their order: a damaged file must not take the others with it."""
        episodes = []
        for id in ids:
            try:
                episodes.append(self.get(id))
            except (KeyError, DamagedError):
                continue
        return episodes

    def sample(self, B: int, T: int, rng: np.random.Generator) -> Batch:
        """B sequences of T rows from all complete episodes, drawn as ``Snapshot.sample`` draws them."""
        codec = self._codec()
        with self.lock:
            while True:
                ids, ends = self._order()
                episode, start = draw(ends, B, T, rng)
                try:
                    picked = [self._views(ids[i]) for i in episode]
                except DamagedError:
                    continue
                return gather(picked, start, T, codec)

    def _codec(self) -> ActionCodec:
        if self.codec is None:
            raise ValueError(f"the store at {self.path} was opened without a codec; EpisodeStore(path, codec=...)")
        return self.codec

    def verify(self) -> dict[str, Any]:
        """Hold every byte against its CRC. Returns counts, the ids of damaged episodes and the files set aside."""
        with self.lock:
            damaged, files = set(), set()
            for piece in list(walk_pieces(self._segments)):
                piece.block.checked, piece.block.columns = False, None
            for id, entry in [*self._entries.items(), *((id, _Entry([mark])) for id, mark in self._marks.items())]:
                for piece in entry.pieces:
                    try:
                        piece.block.segment.columns(piece.block)
                        piece.block.segment.info(piece)
                    except DamagedError:
                        damaged.add(id)
                        files.add(piece.block.segment.path.name)
            for id in damaged:
                self._lose(id)
            return {
                "episodes": len(self),
                "steps": self.steps,
                "incomplete": sum(not entry.complete for entry in self._entries.values()),
                "broken": len(self._marks),
                "segments": len(self._segments),
                "bytes": self.bytes,
                "damaged": sorted(damaged),
                "damaged_files": sorted(files),
                "set_aside": list(self.set_aside),
            }

    # The end

    def close(self) -> None:
        """Seal the open segment and give the directory free. Batches and episodes already read stay valid."""
        with self.lock:
            if self._closed:
                return
            try:
                if not self.read_only:
                    self.seal()
            finally:
                self._release()

    def _release(self) -> None:
        self._closed = True
        for segment in self._segments:
            segment.close()
        if self._file_lock is not None:
            os.close(self._file_lock)
            self._file_lock = None

    def __enter__(self) -> EpisodeStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Not sealed: the next opening recovers it. But the directory must not stay locked by what nobody holds.
        if not getattr(self, "_closed", True):
            self._release()


def _join(views: list[Episode]) -> Episode:
    if len(views) == 1:
        return views[0]
    parts = [v.columns() for v in views]
    whole = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    obs = {name: whole[f"obs.{name}"] for name in views[0].obs}
    flags = {flag: whole[flag] for flag in FLAGS}
    return Episode(views[0].id, obs, whole["action"], whole["reward"], info=views[-1].info, **flags)


def _part(columns: Mapping[str, np.ndarray], meta: Mapping[str, Any], fresh: list[int]) -> pa.Table:
    """Some pieces of a block."""
    pieces = meta["pieces"]
    keep = np.repeat([i in set(fresh) for i in range(len(pieces))], [head["rows"] for head in pieces])
    return to_block(
        {name: column[keep] for name, column in columns.items()}, [pieces[i] for i in fresh], meta["common"]
    )


def _schema(columns: Mapping[str, gym.spaces.Box], codec: ActionCodec | None) -> pa.Schema:
    """The columns that an environment's episodes will have."""
    flag = np.zeros(1, bool)
    obs = {name: np.zeros((1, *box.shape), box.dtype) for name, box in columns.items()}
    action = np.zeros((1, *codec.shape), codec.dtype) if codec else np.zeros(1)
    table = to_table(Episode("", obs, action, np.zeros(1, np.float32), flag, flag, flag))
    return table.schema.remove_metadata()


def _types(columns: Mapping[str, gym.spaces.Box] | None, codec: ActionCodec | None) -> dict[str, pa.DataType]:
    """Arrow types of the columns that are known before there is any episode."""
    types = {f.name: f.type for f in _schema(columns or {}, codec)}
    if codec is None:
        del types["action"]
    return types


def _names(schema: pa.Schema | None) -> dict[str, str]:
    return {f.name: str(f.type) for f in schema or ()}
