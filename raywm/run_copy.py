"""A copy of a run's directory beside its segments at `replay.storage`: whoever lost the disk goes on from there.

Shards copy their segments; this copies what else a run must have: its config, checkpoints, metrics and results. They
are small, so a look at the directory now and then, and a copy of the files that have changed, is enough.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.fs as pafs

from raywm.data.mirror import ORIGIN, Mirror, absolute

FOLDER = "run"  # of the copy, at the storage
LOOK_S = 2.0  # between two looks at the directory
LOG_S = 60.0  # metrics.jsonl grows all the time: alone it is copied as often as this
LOG = "metrics.jsonl"
LAST = "config.yaml"  # fetched last: a directory without it holds no run
EPISODES = (f"episodes/{ORIGIN}", "episodes/shards.json")  # whose the segments are, and where they were
LEFT = ("episodes", "tensorboard", "wandb")  # the shards' affair; made anew from metrics.jsonl; its server's


class RunCopy:
    """The copy of run directory `out` at URI or path `storage`; as a context manager, kept up to date by a thread.

    A checkpoint in the copy is whole or counts as not there, as on the disk: its state.json comes last. Where the
    storage is away, that is said once and tried again; leaving the context without an error makes the copy complete.
    Raises OSError then, if that fails.
    """

    def __init__(self, out: Path, storage: str, say: Callable[[str], None] = print):
        self.out, self.say = Path(out), say
        self.uri = f"{str(absolute(storage)).rstrip('/')}/{FOLDER}"
        self._there = Mirror(self.uri)
        self._sent: dict[str, tuple[int, int]] = {}  # file: time of change and size, as it was copied
        self._log_at = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="run-copy")
        self._troubled = False

    def ahead(self) -> bool:
        """Whether the run there is further than that in `out`: it went on elsewhere, or `out` holds none any more."""
        names = self._names()
        if LAST not in names:
            return False
        there = [int(name.split("/")[1]) for name in names if name.endswith("/state.json")]
        if not (self.out / LAST).exists():
            return True
        # looked at without tidying up: another process may be writing a checkpoint there at this moment
        found = (self.out / "checkpoints").glob("[0-9]*/state.json")
        return max(there, default=0) > max((int(path.parent.name) for path in found), default=0)

    def fetch(self) -> None:
        """Copy the run from there into `out`; what makes it a run comes last, or a killed fetch would pass for one."""
        names = sorted(self._names(), key=lambda name: (name == LAST, name.endswith("/state.json")))
        parts = self.out / f".fetch-{os.getpid()}"
        try:
            for name in names:
                (parts / name).parent.mkdir(parents=True, exist_ok=True)
                self._copy(self._there.files, f"{self._there.path}/{name}", pafs.LocalFileSystem(), str(parts / name))
            for name in names:
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(parts / name, self.out / name)
        finally:
            shutil.rmtree(parts, ignore_errors=True)

    def sync(self, log: bool = True) -> None:
        """Copy what has changed; `log`: metrics.jsonl also if that is all that has."""
        changed = {name: seen for name, seen in self._look() if self._sent.get(name) != seen}
        if not changed or (set(changed) == {LOG} and not log):
            return
        self._log_at = time.monotonic()
        # A checkpoint counts the lines of metrics.jsonl: they must be there before it is.
        for name in sorted(changed, key=lambda name: (name.startswith("checkpoints"), name.endswith("state.json"))):
            target = f"{self._there.path}/{name}"
            try:
                self._there.files.create_dir(target.rpartition("/")[0], recursive=True)
                self._copy(pafs.LocalFileSystem(), str(self.out / name), self._there.files, target)
            except FileNotFoundError:
                if (self.out / name).exists():
                    raise
                continue  # a checkpoint that was dropped meanwhile
            self._sent[name] = changed[name]
        self._drop()

    def _look(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for top in sorted(self.out.iterdir()) if self.out.is_dir() else []:
            if top.name.startswith(".") or top.name in LEFT:
                continue
            for path in [top] if top.is_file() else sorted(top.rglob("*")):
                name = path.relative_to(self.out).as_posix()
                if "/." not in name and path.is_file():
                    yield from self._seen(name)
        for name in EPISODES:
            yield from self._seen(name)

    def _seen(self, name: str) -> Iterator[tuple[str, tuple[int, int]]]:
        try:
            found = (self.out / name).stat()
        except FileNotFoundError:
            return
        yield name, (found.st_mtime_ns, found.st_size)

    def _drop(self) -> None:
        """Checkpoints that the run has dropped go there as well, their state.json first."""
        kept = {path.name for path in (self.out / "checkpoints").glob("[!.]*")}
        names = self._names() if kept else []
        for step in {name.split("/")[1] for name in names if name.startswith("checkpoints/")} - kept:
            folder = f"checkpoints/{step}"
            if f"{folder}/state.json" in names:
                self._there.files.delete_file(f"{self._there.path}/{folder}/state.json")
            self._there.files.delete_dir(f"{self._there.path}/{folder}")
            self._sent = {name: seen for name, seen in self._sent.items() if not name.startswith(f"{folder}/")}

    def _names(self) -> list[str]:
        selector = pafs.FileSelector(self._there.path, recursive=True, allow_not_found=True)
        infos = self._there.files.get_file_info(selector)
        return [
            info.path.removeprefix(self._there.path).lstrip("/") for info in infos if info.type == pafs.FileType.File
        ]

    @staticmethod
    def _copy(source: pafs.FileSystem, a: str, target: pafs.FileSystem, b: str) -> None:
        part = f"{b}.part" if isinstance(target, pafs.LocalFileSystem) else b  # object stores show whole objects only
        with source.open_input_stream(a) as reader, target.open_output_stream(part) as writer:
            writer.upload(reader)
        if part != b:
            target.move(part, b)

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            try:
                self.sync(log=time.monotonic() - self._log_at > LOG_S)
                self._troubled = False
            except Exception as error:
                if not self._troubled:
                    self.say(f"the copy of the run at {self.uri} waits: {error}; it is tried again")
                self._troubled = True

    def __enter__(self) -> RunCopy:
        self.sync()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self._closed.set()
        self._thread.join()
        try:
            self.sync()
        except Exception as error:
            if kind is not None:
                return self.say(f"the copy of the run at {self.uri} is not complete: {error}")
            raise OSError(
                f"the copy of the run at {self.uri} is not complete: {error}; run it again with --resume"
            ) from error
