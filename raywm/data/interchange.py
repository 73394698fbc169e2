"""Episodes out to and in from files that other tools read: Parquet, and the transitions that RLlib trains on.

Both are directories of part-00000.parquet, part-00001.parquet, ... of about 128 MB (zstd), cut between episodes.

Parquet, one row a row of an episode (the timing rule of ``raywm.data.episode`` holds):

    episode_id string, t int32, obs.NAME, action, reward float32, is_first, is_last, is_terminal bool

Vectors and images are Arrow's fixed_shape_tensor. Ray Data shows them in their shape, DuckDB as lists and pandas as
flat arrays of a row each; ``np.stack(frame["obs.image"]).reshape(-1, *shape)`` gives the shape back, which stands under
"shapes" in the JSON that each file's key-value metadata has under "raywm", with the dataset's card and the infos.

RLlib, one row a transition, as ``AlgorithmConfig.offline_data(input_=[OUT])`` reads it on the new API stack:

    eps_id, t, obs, actions, rewards, new_obs, terminateds, truncateds
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raywm.data.dataset import Dataset, write_card
from raywm.data.episode import FLAGS, Episode, cut, from_columns, join, validate
from raywm.data.store import EpisodeStore
from raywm.spaces import ActionCodec, columns_from_json, columns_to_json

PART_BYTES = 128 * 2**20
GROUP_BYTES = 32 * 2**20  # of plain columns: what is held in memory
BLOCK_BYTES, BLOCK_EPISODES = 4 * 2**20, 256  # of imports
META = "raywm"

Progress = Callable[[int], Any]


@dataclass
class Source:
    """What an import found, before it is read: episodes, their spaces (None: not known) and what the card says."""

    episodes: Iterable[Episode]
    total: int | None
    columns: Mapping[str, gym.spaces.Box] | None
    codec: ActionCodec | None
    about: dict[str, Any] = field(default_factory=dict)  # env, policy, seed, stream: see write_card
    notes: list[str] = field(default_factory=list)  # what was dropped, guessed or is zero


@contextlib.contextmanager
def fresh(out: str | Path) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` at the end, or is removed: `out` is whole or not there.

    Raises ValueError if `out` is a file, a URI or not empty.
    """
    if "://" in str(out):
        raise ValueError(f"cannot write to {out}, expected a local directory; copy it to its place afterwards")
    path = Path(out).expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{out} is {'not empty' if path.is_dir() else 'a file'}; give a new directory")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_dataset(source: Source, out: str | Path, made_with: str = "", progress: Progress = lambda n: None) -> int:
    """Write a source's episodes as a dataset with a card; returns their number.

    Raises ValueError for an episode that breaks the timing rule or does not fit the spaces; nothing is then left.
    """
    ids: set[str] = set()
    with fresh(out) as folder:
        with EpisodeStore(folder, source.columns, source.codec) as store:
            for episodes in _blocks(source.episodes):
                for episode in episodes:
                    validate(episode, source.columns, source.codec)
                    if episode.id in ids:
                        raise ValueError(f"episode {episode.id!r} comes twice, expected every id once")
                    ids.add(episode.id)
                store.add(join(episodes))
                progress(len(episodes))
            if not ids:
                raise ValueError("there is no episode in the source; nothing was written")
        write_card(folder, source.columns, source.codec, made_with=made_with, **source.about)
    return len(ids)


def _blocks(episodes: Iterable[Episode]) -> Iterator[list[Episode]]:
    """Episodes, as many at a time as a store takes well in one record batch."""
    block: list[Episode] = []
    size = 0
    for episode in episodes:
        block.append(episode)
        size += sum(column.nbytes for column in episode.columns().values())
        if size >= BLOCK_BYTES or len(block) == BLOCK_EPISODES:
            yield block
            block, size = [], 0
    if block:
        yield block


# Parquet, ours


def export_parquet(dataset: Dataset, out: str | Path, progress: Progress = lambda n: None) -> int:
    """Every episode's rows and info; ``import_parquet`` gives the same bits back. Returns the number of episodes."""
    with fresh(out) as folder, _Parts(folder, _card(dataset)) as parts:
        for episode in dataset:
            columns = {"t": np.arange(len(episode), dtype=np.int32)} | episode.columns()
            parts.add({"episode_id": episode.id}, columns, episode.info)
            progress(1)
        return parts.episodes


def import_parquet(source: str | Path) -> Source:
    """What ``export_parquet`` wrote. Raises ValueError for Parquet of another kind."""
    files = sorted(Path(source).expanduser().glob("*.parquet"))
    if not files:
        raise ValueError(f"no *.parquet in {source}, expected a directory that raywm data export wrote")
    metas = [_meta(path) for path in files]
    card = metas[0]["card"]
    spaces = card["spaces"] or {}
    return Source(
        (episode for path, meta in zip(files, metas) for episode in _read_part(path, meta)),
        sum(len(meta["infos"]) for meta in metas),
        columns_from_json(spaces["columns"]) if spaces else None,
        ActionCodec.from_json(spaces["action"]) if spaces else None,
        {key: card[key] for key in ("env", "policy", "seed", "stream")},
    )


def _card(dataset: Dataset) -> dict[str, Any]:
    """What files carry of a dataset so that an import can write its card again."""
    about: dict[str, Any] = {"env": None, "policy": "unknown", "seed": None, "stream": "collect", "spaces": None}
    about |= {key: value for key, value in (dataset.card or {}).items() if key in about}
    if dataset.columns is not None and dataset.codec is not None:
        about["spaces"] = {"action": dataset.codec.to_json(), "columns": columns_to_json(dataset.columns)}
    return about


def _meta(path: Path) -> dict[str, Any]:
    try:
        schema, raw = pq.read_schema(path), (pq.read_metadata(path).metadata or {}).get(META.encode())
    except Exception as error:  # of any kind: extension types, where some are registered, read their own metadata
        raise ValueError(f"{path} cannot be read: {error}") from None
    if raw is None:
        raise ValueError(f"{path} was not written by raywm data export (no {META!r} metadata); it cannot be imported")
    names = schema.names
    if "episode_id" in names and not pa.types.is_string(schema.field("episode_id").type):
        # an extension type's values may be whatever its class makes of the bytes: Ray Data has one that unpickles
        raise ValueError(f"{path}: episode_id is {schema.field('episode_id').type}, expected string")
    if "episode_id" not in names:
        raise ValueError(
            f"{path} has columns {names}, expected episode_id, t, obs.*, ...: it was exported with --format rllib, "
            "which leaves out what an episode needs; export the dataset with --format parquet"
        )
    try:
        meta: dict[str, Any] = json.loads(raw)
        spaces, infos = meta["card"]["spaces"], meta["infos"]
        if not isinstance(meta["common"], dict) or not isinstance(infos, list) or not isinstance(spaces or {}, dict):
            raise TypeError("of other types")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its {META!r} metadata is damaged ({type(error).__name__}: {error})") from None
    return meta


def _read_part(path: Path, meta: dict[str, Any]) -> Iterator[Episode]:
    infos = iter(meta["infos"])
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            ids, table = table.column("episode_id"), table.drop_columns(["episode_id", "t"])
            for flag in FLAGS:  # Arrow's booleans are bits, which numpy cannot view
                place = table.schema.get_field_index(flag)
                table = table.set_column(place, flag, table.column(flag).cast(pa.uint8()))
            columns = from_columns(table)
            starts = columns["is_first"].nonzero()[0].tolist()  # whole episodes: see _Parts
            for start, stop in zip(starts, [*starts[1:], table.num_rows]):
                yield cut(columns, ids[start].as_py(), start, stop, meta["common"] | next(infos))


# RLlib


def export_rllib(
    dataset: Dataset, out: str | Path, column: str | None = None, progress: Progress = lambda n: None
) -> int:
    """Transitions as RLlib's offline algorithms (BC, MARWIL, CQL) read them. Returns the number of episodes.

    One observation column (`column`, or the only one) is written as it is; several vectors as a struct, which RLlib
    reads as a dict. Raises ValueError for several columns with an image among them: RLlib would read it flat.
    """
    with fresh(out) as folder, _Parts(folder, _card(dataset)) as parts:
        for episode in dataset:
            obs = _observation(episode, column)
            ended = {"terminateds": episode.is_terminal, "truncateds": episode.is_last & ~episode.is_terminal}
            columns = {
                "t": np.arange(episode.steps, dtype=np.int32),
                **{f"obs{name}": values[:-1] for name, values in obs.items()},
                "actions": episode.action[1:],  # chosen on obs[t], it led to row t + 1, where its reward arrived
                "rewards": episode.reward[1:],
                **{f"new_obs{name}": values[1:] for name, values in obs.items()},
                **{name: flags[1:] for name, flags in ended.items()},
            }
            parts.add({"eps_id": episode.id}, columns, {})
            progress(1)
        return parts.episodes


def _observation(episode: Episode, column: str | None) -> dict[str, np.ndarray]:
    """{"": the only column} or {".NAME": column}, the fields of a struct."""
    obs = episode.obs
    if column is not None and column not in obs:
        raise ValueError(f"there is no observation column {column!r}, expected one of {sorted(obs)}")
    if column is not None or len(obs) == 1:
        return {"": obs[column or next(iter(obs))]}
    flat = [name for name, values in obs.items() if values.ndim > 2]
    if flat:
        raise ValueError(f"RLlib's reader keeps the shape of images only if they are alone; choose --column {flat[0]}")
    return {f".{name}": obs[name] for name in sorted(obs)}


class _Parts:
    """Parquet files in a folder. A row group holds whole episodes, and so does a file."""

    def __init__(self, folder: Path, card: dict[str, Any]):
        self.folder, self.card, self.episodes = folder, card, 0
        self._waiting: list[tuple[dict[str, str], dict[str, np.ndarray]]] = []
        self._bytes, self._files = 0, 0
        self._infos: list[dict[str, Any]] = []
        self._shapes: dict[str, list[int]] = {}
        self._sink: Any = None
        self._writer: pq.ParquetWriter | None = None

    def add(self, texts: dict[str, str], columns: dict[str, np.ndarray], info: dict[str, Any]) -> None:
        """An episode: columns (rows, *), and `texts` that are the same in all its rows."""
        self._waiting.append((texts, columns))
        self._infos.append(info)
        self._bytes += sum(values.nbytes for values in columns.values())
        self.episodes += 1
        if self._bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = np.array([len(next(iter(columns.values()))) for _, columns in self._waiting])
        arrays: dict[str, pa.Array] = {}
        for name in self._waiting[0][0]:
            which = pa.array(np.repeat(np.arange(len(rows), dtype=np.int32), rows))
            names = pa.array([texts[name] for texts, _ in self._waiting])
            arrays[name] = pa.DictionaryArray.from_arrays(which, names).cast(pa.string())
        for name in self._waiting[0][1]:
            values = np.concatenate([columns[name] for _, columns in self._waiting])
            self._shapes[name] = list(values.shape[1:])
            arrays[name] = _tensor(values)
        table = pa.table(_structs(arrays))
        if self._writer is None:
            path = self.folder / f"part-{self._files:05d}.parquet"
            self._files += 1
            self._sink = open(path, "wb")
            texts = list(self._waiting[0][0])
            self._writer = pq.ParquetWriter(self._sink, table.schema, compression="zstd", use_dictionary=texts)
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._waiting, self._bytes = [], 0
        if self._sink.tell() >= PART_BYTES:
            self._finish()

    def _finish(self) -> None:
        if self._writer is None:
            return
        common = _shared(self._infos)
        infos = [{key: value for key, value in info.items() if key not in common} for info in self._infos]
        meta = {"card": self.card, "shapes": self._shapes, "common": common, "infos": infos}
        self._writer.add_key_value_metadata({META: json.dumps(meta)})
        self._writer.close()
        self._sink.flush()
        os.fsync(self._sink.fileno())
        self._sink.close()
        self._writer, self._infos = None, []

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self._flush()
            self._finish()
            if not self.episodes:
                raise ValueError("there is no episode to export; nothing was written")
        elif self._sink is not None:
            self._sink.close()


def _tensor(values: np.ndarray) -> pa.Array:
    """(N, *) as a column: plain numbers, or a tensor a row."""
    if values.ndim == 1:
        return pa.array(values)
    flat = pa.array(values.reshape(-1))
    tensor = pa.fixed_shape_tensor(flat.type, values.shape[1:])
    return pa.ExtensionArray.from_storage(tensor, pa.FixedSizeListArray.from_arrays(flat, type=tensor.storage_type))


def _structs(arrays: dict[str, pa.Array]) -> dict[str, pa.Array]:
    """Columns "obs.a", "obs.b" of RLlib's form as one struct "obs"; a dataset's own names stay."""
    if "eps_id" not in arrays:
        return arrays
    out: dict[str, Any] = {}
    for name, array in arrays.items():
        outer, dot, inner = name.partition(".")
        if dot:
            out.setdefault(outer, {})[inner] = array
        else:
            out[name] = array
    return {
        name: pa.StructArray.from_arrays(list(part.values()), names=list(part)) if isinstance(part, dict) else part
        for name, part in out.items()
    }


def _shared(infos: list[dict[str, Any]]) -> dict[str, Any]:
    """What all infos say alike."""
    first = infos[0] if infos else {}
    return {key: value for key, value in first.items() if all(key in i and repr(i[key]) == repr(value) for i in infos)}
