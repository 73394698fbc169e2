"""Copies of a store's sealed segments at a URI, from which a shard that lost its disk begins again."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow.fs as pafs

from raywm.data.segment import NAME, sync_directory


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
        """Fetch the segments that `to` lacks, the newest up to `capacity_bytes`; their names.

        A segment that `to` has, sealed or still open, is left as it is.
        """
        have = {match.group(1) for name in os.listdir(to) if (match := NAME.fullmatch(name))}
        fetched, room = [], capacity_bytes
        for name, size in sorted(self.names().items(), reverse=True):
            room = None if room is None else room - size
            if room is not None and room < 0:
                break
            match = NAME.fullmatch(name)
            if match and match.group(1) not in have:
                part = to / f"{name}.part"
                self._copy(self.files, f"{self.path}/{name}", pafs.LocalFileSystem(), str(part))
                os.replace(part, to / name)
                fetched.append(name)
        if fetched:
            sync_directory(to)
        return fetched

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
        for name in names:
            self.files.delete_file(f"{self.path}/{name}")

    @staticmethod
    def _copy(source: pafs.FileSystem, a: str, target: pafs.FileSystem, b: str) -> None:
        with source.open_input_stream(a) as reader, target.open_output_stream(b) as writer:
            writer.upload(reader)
