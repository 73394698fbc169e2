"""One file of an episode store: an Arrow IPC stream whose record batches are blocks of pieces of episodes.

Any Arrow reader can open a segment. Each record batch carries as custom metadata its block's header (JSON: the headers
of its pieces, what they share, rows, CRC of the column bytes) and the CRC of that header, so a walk over the message
headers rebuilds the index without reading any body.
"""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raywm.data.episode import from_columns

END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # Arrow's end of stream
# Number, the lineage of the directory that wrote it (``raywm.data.lineage``; older ones have none), open or sealed.
NAME = re.compile(r"segment-(\d{8})(?:-([0-9a-f]{8}))?(\.open)?\.arrows")
HEADER, HEADER_CRC = b"raywm", b"raywm.crc"


class DamagedError(OSError):
    """Bytes on disk are not what was written. `rest`: the segment, with the blocks of it that are whole."""

    rest: Segment | None = None


@dataclass(eq=False, slots=True)
class Block:
    """Where a record batch is in its segment."""

    segment: Segment
    offset: int  # of its message in the file
    size: int
    rows: int
    crc: int  # of the column bytes
    head: tuple[int, int, int]  # offset in the file, size and CRC of its header
    checked: bool = False  # whether the bytes have been held against the CRC
    columns: dict[str, np.ndarray] | None = None  # views, once touched


@dataclass(eq=False, slots=True)
class Piece:
    """Rows [first_row, first_row + rows) of an episode: rows [start, start + rows) of a block. No rows: a broken one.

    Its info stays on disk (``Segment.info``): short episodes are smaller than their infos.
    """

    block: Block
    index: int  # in its block
    start: int
    id: str
    first_row: int
    rows: int
    last: bool


@dataclass(eq=False)
class Segment:
    """A segment on disk: `open` while it is appended to, then sealed and memory-mapped."""

    path: Path
    number: int
    open: bool
    end: int = 0  # bytes up to the end of the last whole block
    schema: pa.Schema | None = None
    pieces: list[Piece] = field(default_factory=list)
    skipped: bool = False  # whether a block with a damaged header is left out
    ended: bool = False  # whether the stream has its end mark
    _fd: int | None = None
    _map: pa.Buffer | None = None
    _start: int = 0  # bytes of the stream before its first batch, and their CRC
    _start_crc: int = 0
    _header: tuple[int, dict[str, Any]] | None = None  # the last one read, by its offset

    @property
    def lineage(self) -> str:
        """Of the directory that wrote it."""
        match = NAME.fullmatch(self.path.name)
        return match.group(2) or "" if match else ""

    @classmethod
    def create(cls, directory: Path, number: int, lineage: str, schema: pa.Schema) -> Segment:
        path = directory / f"segment-{number:08d}-{lineage}.open.arrows"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        start = stream_start(schema)
        return cls(path, number, True, schema=schema, _fd=fd, _start=len(start), _start_crc=zlib.crc32(start))

    @classmethod
    def load(cls, path: Path, number: int, open: bool) -> Segment:
        """Walk the message headers of a file. Raises DamagedError unless all of it (of an open one: a start of it, if
        anything at all) is whole blocks."""
        segment = cls(path, number, open)
        with pa.memory_map(str(path)) if path.stat().st_size else pa.BufferReader(b"") as file:
            buffer = file.read_buffer()  # stays mapped while it is used; the file descriptor does not stay open
        trouble = segment._walk(buffer)
        if open and not segment.pieces and len(buffer) >= 4 and buffer[:4].to_pybytes() != END[:4]:
            raise DamagedError(f"not an Arrow stream ({trouble})")
        if trouble and (not open or segment.skipped):
            error = DamagedError(trouble)
            segment._map, error.rest = buffer, segment
            raise error
        if open:
            # A truncation under a mapping is a bus error; what may still be cut is read, not mapped.
            segment._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        else:
            segment._map = buffer
        return segment

    def _walk(self, buffer: pa.Buffer) -> str:
        """Index all whole blocks; what is wrong with the others, or ended the walk early, or ""."""
        source, trouble = pa.BufferReader(buffer), ""
        try:
            with pa.ipc.open_stream(source) as reader:
                self.schema = reader.schema
                self.end = self._start = source.tell()
                start_crc = zlib.crc32(buffer.slice(0, self._start))
                while True:
                    batch, meta = reader.read_next_batch_with_custom_metadata()
                    if meta is None or HEADER not in meta:
                        return "a record batch without raywm's header"
                    if str(zlib.crc32(meta[HEADER])).encode() != meta[HEADER_CRC]:
                        trouble = trouble or f"the header of the block at byte {self.end} does not match its CRC"
                        self.end, self.skipped = source.tell(), True
                        continue
                    header = _parse(meta[HEADER])
                    if header.get("start_crc", start_crc) != start_crc:
                        return "the schema does not match its CRC"
                    batch.validate()  # lengths against buffers: no body is read
                    if batch.num_rows != header["rows"] or header["rows"] != sum(p["rows"] for p in header["pieces"]):
                        return f"a block of {batch.num_rows} rows whose header says otherwise"
                    size = source.tell() - self.end
                    head = self._head(memoryview(buffer.slice(self.end, size)), meta[HEADER])
                    self._index(Block(self, self.end, size, header["rows"], header["crc"], head), header["pieces"])
                    self.end = source.tell()
        except StopIteration:
            rest = len(buffer) - self.end
            self.ended = rest == len(END)
            return trouble or ("" if rest in (0, len(END)) else f"{rest} bytes after the end of the stream")
        except Exception as error:  # of any kind: extension types, where some are registered, read their own metadata
            return trouble or str(error)

    def _index(self, block: Block, headers: list[dict[str, Any]]) -> list[Piece]:
        start, pieces = 0, []
        for index, head in enumerate(headers):
            pieces.append(Piece(block, index, start, head["id"], head["first_row"], head["rows"], head["last"]))
            start += head["rows"]
        self.pieces += pieces
        return pieces

    def _head(self, message: memoryview, head: bytes) -> tuple[int, int, int]:
        """Where a block's header is in the file: it stands as it is in the message's metadata."""
        length = int.from_bytes(message[4:8], "little")
        return self.end + bytes(message[: 8 + length]).index(head), len(head), zlib.crc32(head)

    def append(self, table: pa.Table, meta: Mapping[str, Any]) -> list[Piece]:
        """Write one block (``to_block``). After an error (a full disk) the file is as it was before."""
        assert self._fd is not None and self.schema is not None
        # to_batches() of no rows gives no batch, and combine_chunks() copies even a single one
        arrays = [c.chunk(0) if c.num_chunks == 1 else c.combine_chunks() for c in table.columns]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        crc = columns_crc(from_columns(batch))
        head = json.dumps({"rows": batch.num_rows, "crc": crc, "start_crc": self._start_crc, **meta}).encode()
        sink = _Parts()  # the columns go from the table's memory to the file
        writer = pa.ipc.new_stream(pa.PythonFile(sink, "w"), self.schema)
        writer.write_batch(batch, custom_metadata={HEADER: head, HEADER_CRC: str(zlib.crc32(head)).encode()})
        schema, message, size = sink.split(self._start)
        try:
            write_all(self._fd, message if self.end else schema + message, self.end)
        except OSError as error:
            os.ftruncate(self._fd, self.end)
            why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise OSError(
                error.errno,
                f"episode {meta['pieces'][0]['id']!r} was not stored: {why}; the store is whole and goes on once "
                "there is room (free some, or set a smaller capacity)",
                str(self.path),
            ) from error
        self.end = self.end or self._start
        start = memoryview(b"".join(part for part in message if isinstance(part, bytes)))  # of it; without columns
        block = Block(self, self.end, size, batch.num_rows, crc, self._head(start, head), checked=True)
        self.end += size
        return self._index(block, meta["pieces"])

    def save(self, path: Path) -> None:
        """Write the blocks that this segment has as a sealed one of their own."""
        assert self._map is not None
        blocks = {piece.block.offset: piece.block for piece in self.pieces}
        with open(path, "wb") as file:
            file.write(self._map.slice(0, self._start))
            for block in blocks.values():
                file.write(self._map.slice(block.offset, block.size))
            file.write(END)
            file.flush()
            os.fsync(file.fileno())

    def seal(self) -> None:
        """Finish the stream, bring it to disk, and give it its final name at once."""
        assert self.open
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC) if self._fd is None else self._fd
        try:
            os.ftruncate(fd, self.end)
            try:
                write_all(fd, [END], self.end)
            except OSError:
                os.ftruncate(fd, self.end)  # a full disk: a stream may end without its end mark
            os.fsync(fd)
        finally:
            os.close(fd)
            self._fd = None
        sealed = self.path.with_name(sealed_name(self.path.name))
        os.rename(self.path, sealed)
        sync_directory(sealed.parent)
        self.path, self.open = sealed, False
        with pa.memory_map(str(sealed)) as file:
            self._map = file.read_buffer()
        for piece in self.pieces:
            piece.block.columns = None  # they were copies; from now on the mapping serves

    def columns(self, block: Block) -> dict[str, np.ndarray]:
        """A block's columns: read-only views of the mapping (of an open segment: of a copy). CRC at first touch.

        Raises DamagedError for bytes that are not what was written.
        """
        if block.columns is None:
            try:
                batch = pa.ipc.read_record_batch(
                    pa.ipc.read_message(self._bytes(block.offset, block.size)), self.schema
                )
                columns = from_columns(batch)
            except (pa.ArrowException, ValueError) as error:
                raise DamagedError(f"{self.path.name}: block at byte {block.offset} is unreadable: {error}") from error
            if not block.checked:
                crc = columns_crc(columns)
                if crc != block.crc:
                    raise DamagedError(
                        f"{self.path.name}: the CRC of the block at byte {block.offset} is {crc}, expected {block.crc}"
                    )
                block.checked = True
            block.columns = columns
        return block.columns

    def info(self, piece: Piece) -> dict[str, Any]:
        """What the block's header says of a piece's episode, with what the block's pieces share."""
        offset, size, crc = piece.block.head
        if self._header is None or self._header[0] != offset:
            head = self._bytes(offset, size).to_pybytes()
            if zlib.crc32(head) != crc:
                raise DamagedError(f"{self.path.name}: the header at byte {offset} is not what was written")
            self._header = offset, _parse(head)
        header = self._header[1]
        return header["common"] | header["pieces"][piece.index]["info"]

    def _bytes(self, offset: int, size: int) -> pa.Buffer:
        if self._map is not None:
            return self._map.slice(offset, size)
        assert self._fd is not None, f"{self.path} is closed"
        return pa.py_buffer(os.pread(self._fd, size, offset))

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self._map = None  # unmapped once the last view is gone


def _parse(head: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(head)
    if "pieces" not in header:  # written before there were blocks: the header of the only piece
        rest = {name: header.pop(name) for name in ("rows", "crc")}
        header = {"pieces": [header | {"rows": rest["rows"]}], "common": {}, **rest}
    return header


def sealed_name(name: str) -> str:
    """What a segment's file is called once it is sealed."""
    return name.replace(".open.", ".")


def walk_pieces(segments: list[Segment]) -> Iterator[Piece]:
    for segment in segments:
        yield from segment.pieces


def columns_crc(columns: Mapping[str, np.ndarray]) -> int:
    crc = 0
    for column in columns.values():
        crc = zlib.crc32(np.ascontiguousarray(column).reshape(-1).view(np.uint8).data, crc)
    return crc


def stream_start(schema: pa.Schema) -> bytes:
    """What a stream holds before its first record batch."""
    sink = pa.BufferOutputStream()
    pa.ipc.new_stream(sink, schema).close()
    return sink.getvalue().to_pybytes()[: -len(END)]


class _Parts:
    """A file for Arrow to write to that keeps what is written, without a copy."""

    closed = False

    def __init__(self) -> None:
        self.parts: list[Any] = []  # bytes, or buffers of a table

    def write(self, part: Any) -> int:
        self.parts.append(part)
        return len(part)

    def split(self, size: int) -> tuple[list[Any], list[Any], int]:
        """The parts of the first `size` bytes, the others, and the bytes of those."""
        ends = list(accumulate(map(len, self.parts)))
        at = ends.index(size) + 1
        return self.parts[:at], self.parts[at:], ends[-1] - size

    def flush(self) -> None:
        """Nothing to do; Arrow asks."""

    def close(self) -> None:
        """Nothing to do; Arrow asks."""


def write_all(fd: int, parts: Sequence[Any], offset: int) -> None:
    """Write buffers one after another."""
    left = deque(memoryview(part).cast("B") for part in parts if len(part))
    while left:
        written = os.pwritev(fd, list(islice(left, 1000)), offset)  # systems take up to 1024 at once
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.popleft())
        if written:
            left[0] = left[0][written:]


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
