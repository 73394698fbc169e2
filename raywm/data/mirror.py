"""Copies of a store's sealed segments at a URI, from which a shard that lost its disk begins again."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import pyarrow.fs as pafs

from raywm.data.segment import NAME, sealed_name, sync_directory

ORIGIN = ".origin"


def absolute(uri: str | None) -> str | None:
    """A relative path as it is meant here: shards run in other directories."""
    return uri if uri is None or "://" in uri else os.path.abspath(uri)


def claim(directory: Path, storage: str, adopt: bool = False) -> None:
    """Tie a storage to the run whose episodes are in `directory`, both by a file ".origin" of the same content.

    `adopt`: the caller knows that the storage is its own, though `directory` is new. Raises ValueError for a storage
    that holds another run's episodes: they have the same names as this one's, and would pass for them.
    """
    mirror, local = Mirror(storage), directory / ORIGIN
    target = f"{mirror.path}/{ORIGIN}"
    mine, theirs = local.read_text() if local.exists() else None, None
    if mirror.files.get_file_info(target).type != pafs.FileType.NotFound:
        with mirror.files.open_input_stream(target) as file:
            theirs = file.read().decode()
    if theirs is None:
        theirs = mine or uuid.uuid4().hex
        mirror.files.create_dir(mirror.path, recursive=True)
        with mirror.files.open_output_stream(target) as file:
            file.write(theirs.encode())
    elif theirs != mine and not adopt:
        raise ValueError(f"{storage} holds the episodes of another run; give another replay.storage, or empty it")
    directory.mkdir(parents=True, exist_ok=True)
    local.write_text(theirs)


def folders(storage: str) -> list[str]:
    """Names of the folders at a URI, sorted: a run's shards have one each."""
    mirror = Mirror(storage)
    infos = mirror.files.get_file_info(pafs.FileSelector(mirror.path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)


class Mirror:
    """The segments of one store at `uri`: a plain path, or anything ``pyarrow.fs.FileSystem.from_uri`` takes.

    Raises ValueError for a URI that nothing here can open, OSError when it cannot be reached or written.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            if "://" in uri:
                self.files, self.path = pafs.FileSystem.from_uri(uri)
            else:
                self.files, self.path = pafs.LocalFileSystem(), os.path.abspath(uri)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"storage {uri!r}: {error}; expected a path or a URI like s3://bucket/folder") from error
        self.path = self.path.rstrip("/")

    def names(self) -> dict[str, int]:
        """Segments there and their sizes, by file name."""
        infos = self.files.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return {info.base_name: info.size for info in infos if NAME.fullmatch(info.base_name)}

    def restore(self, to: Path, capacity_bytes: int | None = None) -> list[str]:
        """Fetch the segments that `to` lacks (``lacking``); their names."""
        fetched = self.lacking(to, capacity_bytes)
        for name in fetched:
            part = to / f"{name}.part"
            self._copy(self.files, f"{self.path}/{name}", pafs.LocalFileSystem(), str(part))
            os.replace(part, to / name)
        if fetched:
            sync_directory(to)
        return fetched

    def lacking(self, directory: Path, capacity_bytes: int | None = None) -> list[str]:
        """Segments there that a directory has neither sealed nor still open: of the newest, up to `capacity_bytes`."""
        have = {sealed_name(name) for name in os.listdir(directory) if NAME.fullmatch(name)}
        lacking, room = [], capacity_bytes
        for name, size in sorted(self.names().items(), reverse=True):
            room = None if room is None else room - size
            if room is not None and room < 0:
                break
            if name not in have:
                lacking.append(name)
        return lacking

    def newest(self) -> int:
        """The highest number of a segment there, or 0."""
        return max((int(match.group(1)) for name in self.names() if (match := NAME.fullmatch(name))), default=0)

    def upload(self, path: Path) -> None:
        """Copy one sealed segment there; readers see all of it or nothing."""
        self.files.create_dir(self.path, recursive=True)
        target = f"{self.path}/{path.name}"
        if isinstance(self.files, pafs.LocalFileSystem):
            self._copy(pafs.LocalFileSystem(), str(path), self.files, f"{target}.part")
            self.files.move(f"{target}.part", target)
        else:  # object stores show an object once it is whole, and would copy it again to rename it
            self._copy(pafs.LocalFileSystem(), str(path), self.files, target)

    def remove(self, names: Iterable[str]) -> None:
        """Delete these segments; those that are gone already are no error."""
        there = self.names()
        for name in names:
            if name in there:
                self.files.delete_file(f"{self.path}/{name}")

    @staticmethod
    def _copy(source: pafs.FileSystem, a: str, target: pafs.FileSystem, b: str) -> None:
        with source.open_input_stream(a) as reader, target.open_output_stream(b) as writer:
            writer.upload(reader)
