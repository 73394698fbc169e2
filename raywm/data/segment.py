"""One file of an episode store: an Arrow IPC stream whose record batches are pieces of episodes.

Any Arrow reader can open a segment. Each record batch carries as custom metadata its piece's header (JSON: id, first
row, rows, last, info, CRC of the column bytes) and the CRC of that header, so a walk over the message headers
rebuilds the index without reading any body.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raywm.data.episode import Episode, from_arrow

END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # Arrow's end of stream
HEADER, HEADER_CRC = b"raywm", b"raywm.crc"


class DamagedError(OSError):
    """Bytes on disk are not what was written."""


@dataclass(eq=False, slots=True)
class Piece:
    """Where a piece of an episode is, and what its header says."""

    segment: Segment
    offset: int  # of its message in the file
    size: int
    id: str
    first_row: int
    rows: int
    last: bool
    crc: int  # of the column bytes
    info: dict[str, Any]
    checked: bool = False  # whether the bytes have been held against the CRC

    def header(self) -> dict[bytes, bytes]:
        names = ("id", "first_row", "rows", "last", "info", "crc")
        head = json.dumps({name: getattr(self, name) for name in names}).encode()
        return {HEADER: head, HEADER_CRC: str(zlib.crc32(head)).encode()}


@dataclass(eq=False)
class Segment:
    """A segment on disk: `open` while it is appended to, then sealed and memory-mapped."""

    path: Path
    number: int
    open: bool
    end: int = 0  # bytes up to the end of the last whole piece
    schema: pa.Schema | None = None
    pieces: list[Piece] = field(default_factory=list)
    ended: bool = False  # whether the stream has its end mark
    _fd: int | None = None
    _map: pa.Buffer | None = None

    @classmethod
    def create(cls, directory: Path, number: int, schema: pa.Schema) -> Segment:
        path = directory / f"segment-{number:08d}.open.arrows"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        return cls(path, number, True, schema=schema, _fd=fd)

    @classmethod
    def load(cls, path: Path, number: int, open: bool) -> Segment:
        """Walk the message headers of a file. Raises DamagedError unless all of it (of an open one: a start of it, if
        anything at all) is whole pieces."""
        segment = cls(path, number, open)
        with pa.memory_map(str(path)) if path.stat().st_size else pa.BufferReader(b"") as file:
            buffer = file.read_buffer()  # stays mapped while it is used; the file descriptor does not stay open
        trouble = segment._walk(buffer)
        if open and not segment.pieces and len(buffer) >= 4 and buffer[:4].to_pybytes() != END[:4]:
            raise DamagedError(f"not an Arrow stream ({trouble})")
        if not open and trouble:
            raise DamagedError(trouble)
        if open:
            # A truncation under a mapping is a bus error; what may still be cut is read, not mapped.
            segment._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        else:
            segment._map = buffer
        return segment

    def _walk(self, buffer: pa.Buffer) -> str:
        """Index all whole pieces; what ended the walk early, or "" at a proper end."""
        source = pa.BufferReader(buffer)
        try:
            with pa.ipc.open_stream(source) as reader:
                self.schema = reader.schema
                self.end = source.tell()
                while True:
                    batch, meta = reader.read_next_batch_with_custom_metadata()
                    if meta is None or HEADER not in meta:
                        return "a record batch without raywm's header"
                    if str(zlib.crc32(meta[HEADER])).encode() != meta[HEADER_CRC]:
                        return f"the header of the piece at byte {self.end} does not match its CRC"
                    piece = Piece(self, self.end, source.tell() - self.end, **json.loads(meta[HEADER]))
                    batch.validate()  # lengths against buffers: no body is read
                    if batch.num_rows != piece.rows:
                        return f"a piece of {batch.num_rows} rows whose header says {piece.rows}"
                    self.pieces.append(piece)
                    self.end = source.tell()
        except StopIteration:
            rest = len(buffer) - self.end
            self.ended = rest == len(END)
            return "" if rest in (0, len(END)) else f"{rest} bytes after the end of the stream"
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            return str(error)

    def append(self, batch: pa.RecordBatch, piece: Piece) -> None:
        """Write one piece. After an error (a full disk) the file is as it was before."""
        assert self._fd is not None and self.schema is not None
        sink = pa.BufferOutputStream()
        writer = pa.ipc.new_stream(sink, self.schema)
        writer.write_batch(batch, custom_metadata=piece.header())
        data = memoryview(sink.getvalue())
        start = stream_start(self.schema)
        piece.offset, piece.size = self.end or start, len(data) - start
        if self.end:
            data = data[start:]  # the schema is there already
        try:
            write_all(self._fd, data, self.end)
        except OSError as error:
            os.ftruncate(self._fd, self.end)
            why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise OSError(
                error.errno,
                f"episode {piece.id!r} was not stored: {why}; the store is whole and goes on once there is room "
                "(free some, or set a smaller capacity)",
                str(self.path),
            ) from error
        self.end += len(data)
        self.pieces.append(piece)

    def seal(self) -> None:
        """Finish the stream, bring it to disk, and give it its final name at once."""
        assert self.open
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC) if self._fd is None else self._fd
        try:
            os.ftruncate(fd, self.end)
            try:
                write_all(fd, memoryview(END), self.end)
            except OSError:
                os.ftruncate(fd, self.end)  # a full disk: a stream may end without its end mark
            os.fsync(fd)
        finally:
            os.close(fd)
        self._fd = None
        sealed = self.path.with_name(f"segment-{self.number:08d}.arrows")
        os.rename(self.path, sealed)
        sync_directory(sealed.parent)
        self.path, self.open = sealed, False
        with pa.memory_map(str(sealed)) as file:
            self._map = file.read_buffer()

    def read(self, piece: Piece) -> Episode:
        """The rows of a piece: read-only views of the mapping (of an open segment: of a copy). CRC at first touch."""
        try:
            if self._map is not None:
                buffer = self._map.slice(piece.offset, piece.size)
            else:
                assert self._fd is not None, f"{self.path} is closed"
                buffer = pa.py_buffer(os.pread(self._fd, piece.size, piece.offset))
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(buffer), self.schema)
            episode = from_arrow(batch, piece.id, piece.info)
        except (pa.ArrowException, ValueError) as error:
            raise DamagedError(f"{self.path.name}: piece of episode {piece.id!r} is unreadable: {error}") from error
        if not piece.checked:
            crc = columns_crc(episode)
            if crc != piece.crc:
                raise DamagedError(
                    f"{self.path.name}: episode {piece.id!r}, rows {piece.first_row} to {piece.first_row + piece.rows}:"
                    f" CRC is {crc}, expected {piece.crc}"
                )
            piece.checked = True
        return episode

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self._map = None  # unmapped once the last view is gone


def walk_pieces(segments: list[Segment]) -> Iterator[Piece]:
    for segment in segments:
        yield from segment.pieces


def columns_crc(episode: Episode) -> int:
    crc = 0
    for column in episode.columns().values():
        crc = zlib.crc32(np.ascontiguousarray(column).reshape(-1).view(np.uint8).data, crc)
    return crc


def stream_start(schema: pa.Schema) -> int:
    """Bytes of a stream before its first record batch."""
    sink = pa.BufferOutputStream()
    pa.ipc.new_stream(sink, schema).close()
    return len(sink.getvalue()) - len(END)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
