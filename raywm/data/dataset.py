"""A directory of collected episodes, seen as one dataset: what is in it, whether it is whole, and its episodes.

DATASET/dataset.json               the card: environment, spaces, policy, seed (``write_card``)
DATASET/segment-*.arrows           episodes, either here
DATASET/shard-*/segment-*.arrows   or in shards, one a node that collected
RUN/spaces.json, RUN/episodes/...  the same inside a run's directory
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import pyarrow.fs as fs

from raywm import __version__
from raywm.checkpoint import atomic_write_json
from raywm.data.episode import Episode, validate
from raywm.data.store import DamagedError, EpisodeStore
from raywm.spaces import ActionCodec, columns_from_json, columns_to_json

CARD = "dataset.json"
FORMAT = 1
NUMBERED = re.compile(r"(.+)-(\d{9})")  # an episode id: stream and number
# A run's turns and trials number their episodes from multiples of this (loops/vmc.py): the gaps between are no loss.
BLOCK = 500_000

Columns = Mapping[str, gym.spaces.Box]


def write_card(
    directory: str | Path,
    columns: Columns | None,
    codec: ActionCodec | None,
    *,
    env: dict[str, Any] | None = None,
    policy: str = "unknown",
    seed: int | None = None,
    stream: str = "collect",
    envs: int | None = None,
    made_with: str = "",
) -> dict[str, Any]:
    """Write a dataset's card, dataset.json, atomically; returns it.

    columns, codec: the spaces, or None where they are not known. env: the environment's config. stream: what episode
    ids begin with. envs: rows of the batch that the agent acted on. made_with: the command, at a resume the last one.
    """
    spaces = None
    if columns is not None and codec is not None:
        spaces = {"action": codec.to_json(), "columns": columns_to_json(columns)}
    card = {"format": FORMAT, "env": env, "spaces": spaces, "policy": policy, "seed": seed, "stream": stream}
    card |= {"envs": envs, "raywm": __version__, "made_with": made_with}
    atomic_write_json(Path(directory) / CARD, card)
    return card


def read_card(directory: str | Path) -> dict[str, Any] | None:
    """A dataset's card, or None where there is none. Raises ValueError for a damaged one or a newer format."""
    path = Path(directory) / CARD
    try:
        card: dict[str, Any] = json.loads(path.read_text())
        version = card["format"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); expected JSON as raywm collect writes it") from None
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, this raywm reads {FORMAT}; use the version that wrote it")
    return card


class Dataset:
    """All episodes under a directory, read-only, in the order of their ids; another process may be writing it.

    `path`: a dataset, a run, a run's episodes/, or a URI (s3://, gs://, ... whatever pyarrow.fs knows). What is not on
    a local disk is first copied into `cache`, by default a temporary directory that goes with ``close()``; `say` is
    told so. An episode that lies in two shards is served once.

    Attributes: path (local), shards {name: EpisodeStore}, card (dict or None), columns and codec (None unless a
    dataset.json or spaces.json tells them). Raises ValueError if there is no dataset, OSError if it cannot be read.
    """

    def __init__(self, path: str | Path, cache: str | Path | None = None, say: Callable[[str], Any] = warnings.warn):
        self._temporary: tempfile.TemporaryDirectory | None = None
        self.source = str(path)
        self.path = self._local(self.source, cache, say)
        self.shards: dict[str, EpisodeStore] = {}
        try:
            root, folders = _folders(self.path)
            self.card = next((c for c in map(read_card, (root, self.path, root.parent)) if c), None)
            self.columns, self.codec = self._spaces(root)
            self.shards = {name: EpisodeStore(folder, read_only=True) for name, folder in folders.items()}
        except BaseException:
            self.close()
            raise
        self._where: dict[str, tuple[str, ...]] = {}
        self._damaged: set[str] = set()  # ids with a copy that was found damaged since the opening
        self._index()

    def _local(self, source: str, cache: str | Path | None, say: Callable[[str], Any]) -> Path:
        if "://" not in source:
            return Path(source).expanduser()
        filesystem, inner = fs.FileSystem.from_uri(source)
        if isinstance(filesystem, fs.LocalFileSystem):
            return Path(inner)
        if cache is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="raywm-data-")
        to = Path(cache or self._temporary.name)  # type: ignore[union-attr]
        size = _fetch(filesystem, inner, to)
        say(f"copied {size / 2**20:.1f} MiB of {source} to {to}{'' if cache else ', for as long as it is open'}")
        return to

    def _spaces(self, root: Path) -> tuple[dict[str, gym.spaces.Box] | None, ActionCodec | None]:
        spaces = (self.card or {}).get("spaces")
        path = next((p for p in (root / "spaces.json", root.parent / "spaces.json") if p.is_file()), None)
        if spaces is None and path is not None:
            spaces = json.loads(path.read_text())
        if spaces is None:
            return None, None
        return columns_from_json(spaces["columns"]), ActionCodec.from_json(spaces["action"])

    def _index(self) -> None:
        where: dict[str, tuple[str, ...]] = {}
        for name, store in self.shards.items():
            for id in store.ids():
                where[id] = (*where.get(id, ()), name)
        self._where, self._ids = where, sorted(where)
        twice = [(id, len(names) - 1) for id, names in where.items() if len(names) > 1]
        more = sum(n * self.get(id).steps for id, n in twice)
        self.steps = sum(store.steps for store in self.shards.values()) - more

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def rows(self) -> int:
        return self.steps + len(self)

    @property
    def bytes(self) -> int:
        return sum(store.bytes for store in self.shards.values())

    @property
    def broken(self) -> dict[str, dict[str, Any]]:
        """Episodes whose environment failed, kept out: {id: info}."""
        marked = {id: info for store in self.shards.values() for id, info in store.broken.items()}
        return {id: marked[id] for id in sorted(marked) if id not in self._where}

    def ids(self) -> list[str]:
        return list(self._ids)

    def get(self, id: str) -> Episode:
        """One episode: read-only views of the disk. Raises KeyError for an unknown id, DamagedError for wrong bytes."""
        names = self._where.get(id, ())
        for name in names:
            try:
                return self.shards[name].get(id)
            except DamagedError:
                self._damaged.add(id)
                if name == names[-1]:
                    raise
            except KeyError:
                continue  # found damaged before; there may be another copy
        raise KeyError(f"no episode {id!r} among the {len(self)} of {self.source}")

    def __iter__(self) -> Iterator[Episode]:
        """One episode after the other; a damaged one is left out with a warning."""
        for id in self._ids:
            try:
                yield self.get(id)
            except (DamagedError, KeyError):
                continue  # the store has warned

    def info(self) -> dict[str, Any]:
        """What there is to say without reading the data."""
        card = self.card or {}
        example = next(iter(self), None)
        about = {"env": (card.get("env") or {}).get("id"), "policy": card.get("policy"), "seed": card.get("seed")}
        if example is not None:
            about |= {k: example.info.get(k) for k, v in about.items() if v is None and k != "seed"}
        streams: dict[str, int] = defaultdict(int)
        for id in self._ids:
            match = NUMBERED.fullmatch(id)
            streams[match.group(1) if match else id] += 1
        columns = {} if example is None else example.columns()
        return {
            "path": self.source,
            "episodes": len(self),
            "steps": self.steps,
            "bytes": self.bytes,
            "mean_length": round(self.steps / len(self), 3) if len(self) else None,
            **about,
            "action_space": str(self.codec.space) if self.codec else None,
            "columns": {name: f"{c.dtype} {c.shape[1:] if c.ndim > 1 else ''}".strip() for name, c in columns.items()},
            "streams": dict(streams),
            "shards": len(self.shards),
            "broken": len(self.broken),
            "made_with": card.get("made_with"),
        }

    def verify(self, progress: Callable[[int], Any] = lambda n: None) -> dict[str, Any]:
        """Hold every byte against its CRC, every episode against the timing rule, every stream against gaps (a run:
        against what its newest checkpoint counts on).

        Returns counts, `damaged` (ids), `doubled` (ids of episodes that differ between two shards; `twins`, equal ones,
        are no harm), `invalid` and `broken` ({id: why}), `missing` (ids or "first..last"), `set_aside` (damaged files
        that are not read; `left_aside`: those of before), `incomplete` (episodes whose end has not come), and `ok`:
        nothing is damaged, doubled, invalid, missing or set aside. `progress` is called with 1 an episode.
        """
        everything = set(self._ids)
        twins = [id for id in self._ids if len(self._where[id]) > 1]
        doubled = [id for id in twins if not self._equal(id)]
        reports = {name: store.verify() for name, store in self.shards.items()}
        damaged = sorted(self._damaged.union(*(report["damaged"] for report in reports.values())))
        set_aside = {f"{name}/{file}".lstrip("/") for name, report in reports.items() for file in report["set_aside"]}
        left = [f"{n}/{f.name}".lstrip("/") for n, store in self.shards.items() for f in store.path.glob("*.damaged")]
        if self.card is None:  # nothing else tells what was lost with them
            set_aside |= set(left)
        self._index()  # the stores serve no longer what they found damaged
        invalid: dict[str, str] = {}
        first: Any = None
        for episode in self:
            first = first or episode
            try:
                validate(episode, self.columns, self.codec)
                _alike(episode, first)
            except ValueError as error:
                invalid[episode.id] = str(error)
            progress(1)
        missing = self._missing(everything | set(damaged) | set(self.broken))
        trouble = {
            "damaged": damaged,
            "doubled": doubled,
            "invalid": invalid,
            "missing": missing,
            "set_aside": sorted(set_aside),
        }
        return {
            "path": self.source,
            "ok": not any(trouble.values()),
            "episodes": len(self),
            "steps": self.steps,
            "bytes": self.bytes,
            "shards": len(self.shards),
            "incomplete": sum(report["incomplete"] for report in reports.values()),
            "twins": len(twins) - len(doubled),
            "left_aside": sorted(left),
            "broken": {id: str(info.get("broken", "")) for id, info in self.broken.items()},
            **trouble,
        }

    def _equal(self, id: str) -> bool:
        """Whether an episode has the same bits wherever it lies; a damaged copy says nothing."""
        copies = []
        for name in self._where[id]:
            with contextlib.suppress(DamagedError, KeyError):
                copies.append(self.shards[name].get(id).columns())
        return all(a[c].tobytes() == copies[0][c].tobytes() for a in copies[1:] for c in copies[0])

    def _missing(self, known: set[str]) -> list[str]:
        """Gaps in the numbers of each stream, as ids or "first..last"; of a run, what it has accepted and lost."""
        accepted = _accepted(self.path)
        if accepted is not None:  # a run stops in the middle of things: beyond what it accepted, gaps are no loss
            return sorted(set(accepted) - known)
        numbers: dict[tuple[str, int], list[int]] = defaultdict(list)
        for id in known:
            if match := NUMBERED.fullmatch(id):
                number = int(match.group(2))
                numbers[match.group(1), 0 if self.card else number // BLOCK].append(number)
        lost = ((self.card or {}).get("episodes") or 0) - len(known)  # the card says how many were there in the end
        evicted = self.card is None and any(map(_evicted, self.shards.values()))
        gaps = []
        for (stream, block), found in sorted(numbers.items()):
            found.sort()
            before = found[0] - 1 if evicted else block * BLOCK - 1
            for number in found:
                if number > before + 1:
                    ends = [f"{stream}-{n:09d}" for n in (before + 1, number - 1)]
                    gaps.append(ends[0] if ends[0] == ends[1] else "..".join(ends))
                before = number
        return gaps if gaps or lost <= 0 else [f"{lost} episodes at the end"]

    def close(self) -> None:
        """Give files and a temporary copy free; episodes already read stay valid."""
        for store in self.shards.values():
            store.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _folders(path: Path) -> tuple[Path, dict[str, Path]]:
    """(the folder of the episodes, {shard: folder}); a dataset without shards has one shard, ""."""
    if not path.is_dir():
        raise ValueError(f"there is no dataset at {path}, expected a directory made by raywm collect, or a run's")
    for root in (path, path / "episodes"):
        shards = {p.name: p for p in sorted(root.glob("shard-*")) if p.is_dir()}
        if any(root.glob("segment-*")):
            shards[""] = root
        if shards or (root / CARD).is_file():
            return root, shards
    if (path / "episodes").is_dir() or path.name == "episodes":
        return (path / "episodes" if path.name != "episodes" else path), {}  # a run before its first episode
    raise ValueError(
        f"{path} holds no episodes, expected segment-*.arrows, shard-*/ or episodes/ in it; collect some first"
    )


def _accepted(path: Path) -> list[str] | None:
    """Ids of the episodes that a run counts on, by its newest checkpoint; None where there is no run."""
    run = next((p for p in (path, path.parent) if (p / "config.yaml").is_file()), None)
    if run is None or run != path and path.name != "episodes":
        return None
    states = sorted(run.glob("checkpoints/[0-9]*/state.json"))
    return json.loads(states[-1].read_text())["state"].get("accepted", []) if states else []


def _fetch(filesystem: fs.FileSystem, path: str, to: Path) -> int:
    """Copy a dataset's files to a local directory; returns their bytes."""
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    wanted = re.compile(r"((episodes/)?(shard-[^/]+/)?segment-[^/]+|(episodes/)?dataset\.json|spaces\.json)")
    root, size = path.strip("/"), 0
    for info in found:
        inner = info.path.strip("/").removeprefix(root).strip("/")
        if info.type == fs.FileType.File and wanted.fullmatch(inner):
            target = to / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            local = fs.LocalFileSystem()
            fs.copy_files(info.path, str(target), source_filesystem=filesystem, destination_filesystem=local)
            size += info.size
    return size


def _evicted(store: EpisodeStore) -> bool:
    """Whether a store's oldest segments are gone: they are numbered from 1 on."""
    numbers = [int(m.group(1)) for p in store.path.iterdir() if (m := re.match(r"segment-(\d+)", p.name))]
    return bool(numbers) and min(numbers) > 1


def _alike(episode: Episode, first: Episode) -> None:
    got, expected = ({name: (c.dtype, c.shape[1:]) for name, c in e.columns().items()} for e in (episode, first))
    if got != expected:
        raise ValueError(f"episode {episode.id!r} has columns {got}, expected {expected} as {first.id!r} has")
