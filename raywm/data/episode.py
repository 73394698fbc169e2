"""An episode, its timing rule, and its Arrow form.

The timing rule: row t is everything that arrived together with observation t. ``action[t]`` is the action that LED
here and ``reward[t]`` was received on arriving. Row 0 has the zero action and zero reward and is ``is_first``; the
final observation is kept, so T rows hold T - 1 transitions. ``is_last = terminated or truncated``,
``is_terminal = terminated`` only: a truncated episode bootstraps, a terminated one does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa

from raywm.spaces import ActionCodec

FLAGS = ("is_first", "is_last", "is_terminal")
META = b"raywm"  # the key of the JSON in an Arrow schema's metadata: {"id", "first_row", "info"}
OBS = "obs."  # keeps an observation column called "reward" apart from the reward


@dataclass(frozen=True, eq=False)  # eq=False: comparing arrays by == has no single truth value
class Episode:
    """One episode of T rows; every column's first axis is T. See the module's docstring for the timing rule."""

    id: str
    obs: dict[str, np.ndarray]
    action: np.ndarray  # (T, *shape), as the environment takes them
    reward: np.ndarray  # (T,) float32
    is_first: np.ndarray  # (T,) bool
    is_last: np.ndarray
    is_terminal: np.ndarray
    info: dict[str, Any] = field(default_factory=dict)  # anything JSON

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def steps(self) -> int:
        """Transitions: one less than the rows."""
        return len(self.reward) - 1

    @property
    def ret(self) -> float:
        """The return: the plain sum of rewards."""
        return float(self.reward.sum(dtype=np.float64))

    def columns(self) -> dict[str, np.ndarray]:
        """All columns by their stored names, in their stored order (which is not the dict's, but sorted)."""
        obs = {OBS + name: self.obs[name] for name in sorted(self.obs)}
        return obs | {"action": self.action, "reward": self.reward} | {flag: getattr(self, flag) for flag in FLAGS}


def to_table(episode: Episode, first_row: int = 0, stop: int | None = None) -> pa.Table:
    """An episode, or the piece [first_row, stop) of it, as a table whose schema metadata carries id and info."""
    meta = {"id": episode.id, "first_row": first_row, "info": episode.info}
    arrays = {name: _to_arrow(column[first_row:stop]) for name, column in episode.columns().items()}
    return pa.table(arrays).replace_schema_metadata({META: json.dumps(meta).encode()})


def from_table(table: pa.Table | pa.RecordBatch) -> Episode:
    """The episode (or piece) in a table. Columns are read-only views of the table's memory where Arrow allows."""
    meta = table_meta(table)
    return from_arrow(table, meta["id"], meta["info"])


def table_meta(table: pa.Table | pa.RecordBatch) -> dict[str, Any]:
    """{"id", "first_row", "info"} of a table made by ``to_table``."""
    raw = (table.schema.metadata or {}).get(META)
    if raw is None:
        raise ValueError(f"table has no {META.decode()!r} schema metadata; expected one made by to_table(episode)")
    return json.loads(raw)


def from_arrow(table: pa.Table | pa.RecordBatch, id: str, info: dict[str, Any]) -> Episode:
    """An episode from Arrow columns whose id and info travel elsewhere (in a store they are the batch's metadata)."""
    missing = [name for name in ("action", "reward", *FLAGS) if name not in table.schema.names]
    if missing:
        raise ValueError(f"table of episode {id!r} lacks {missing}, got columns {table.schema.names}")
    columns = {name: _from_arrow(table.column(name)) for name in table.schema.names}
    flags = {flag: columns[flag].view(bool) for flag in FLAGS}
    obs = {name.removeprefix(OBS): column for name, column in columns.items() if name.startswith(OBS)}
    return Episode(id, obs, columns["action"], columns["reward"], info=info, **flags)


def _to_arrow(column: np.ndarray) -> pa.Array:
    """Zero-copy, and from buffers: pa.array(...) would import pandas first, for half a second in every process."""
    column = np.ascontiguousarray(column)
    if column.dtype == bool:
        column = column.view(np.uint8)  # Arrow's own booleans are bits, which numpy cannot view
    flat = column.reshape(-1)
    values = pa.Array.from_buffers(pa.from_numpy_dtype(flat.dtype), len(flat), [None, pa.py_buffer(flat)])
    if column.ndim == 1:
        return values
    tensor = pa.fixed_shape_tensor(values.type, column.shape[1:])
    rows = pa.FixedSizeListArray.from_arrays(values, type=tensor.storage_type)
    return pa.ExtensionArray.from_storage(tensor, rows)


def _from_arrow(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(column, pa.FixedShapeTensorArray):
        return column.to_numpy_ndarray()
    if not pa.types.is_primitive(column.type) or pa.types.is_boolean(column.type) or column.null_count:
        raise ValueError(f"column of type {column.type} with {column.null_count} nulls, expected plain numbers")
    values = np.frombuffer(column.buffers()[1], column.type.to_pandas_dtype())  # to_numpy() would import pandas
    return values[column.offset : column.offset + len(column)]


def validate(
    episode: Episode,
    columns: Mapping[str, gym.spaces.Box] | None = None,
    codec: ActionCodec | None = None,
    first_row: int = 0,
    last: bool = True,
) -> None:
    """Raise ValueError, naming the episode and the row, unless the episode keeps the timing rule and holds no NaN.

    `columns` and `codec`, where given, also fix names, shapes and dtypes. A piece is checked with its `first_row` in
    the episode and whether it is the `last` one.
    """
    name, rows = f"episode {episode.id!r}", len(episode)
    if not isinstance(episode.id, str) or not episode.id:
        raise ValueError(f"episode id is {episode.id!r}, expected a non-empty string")
    if rows == 0 or first_row + rows < 2 and last:
        raise ValueError(f"{name} has {rows} rows, expected at least 2: the first observation and one step")
    for column, values in episode.columns().items():
        if len(values) != rows:
            raise ValueError(f"{name}: column {column!r} has {len(values)} rows, expected {rows} as reward has")
    _validate_types(episode, name, columns, codec)

    for column, values in episode.columns().items():
        if values.dtype.kind == "f":
            bad = ~np.isfinite(values).reshape(rows, -1).all(1)
            if bad.any():
                row = first_row + int(bad.argmax())
                raise ValueError(f"{name}, row {row}: {column} is NaN or infinite, expected finite numbers")
    expected = np.arange(first_row, first_row + rows)
    _validate_flag(name, "is_first", episode.is_first, expected == 0, first_row)
    _validate_flag(name, "is_last", episode.is_last, (expected == first_row + rows - 1) & last, first_row)
    wrong = episode.is_terminal & ~episode.is_last
    if wrong.any():
        raise ValueError(f"{name}, row {first_row + int(wrong.argmax())}: is_terminal on a row that is not is_last")
    if first_row == 0 and episode.reward[0] != 0:
        raise ValueError(
            f"{name}, row 0: reward is {episode.reward[0]}, expected 0; "
            "row t holds the reward received on ARRIVING at observation t"
        )


def _validate_flag(name: str, flag: str, got: np.ndarray, expected: np.ndarray, first_row: int) -> None:
    wrong = got != expected
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"{name}, row {first_row + row}: {flag} is {bool(got[row])}, expected {bool(expected[row])}")


def _validate_types(
    episode: Episode, name: str, columns: Mapping[str, gym.spaces.Box] | None, codec: ActionCodec | None
) -> None:
    rows = len(episode)
    wanted: dict[str, tuple[tuple[int, ...], np.dtype]] = {"reward": ((rows,), np.dtype(np.float32))}
    wanted |= {flag: ((rows,), np.dtype(bool)) for flag in FLAGS}
    if columns is not None:
        if set(episode.obs) != set(columns):
            raise ValueError(f"{name} has observation columns {sorted(episode.obs)}, expected {sorted(columns)}")
        wanted |= {OBS + key: ((rows, *box.shape), np.dtype(box.dtype)) for key, box in columns.items()}
    if codec is not None:
        wanted["action"] = ((rows, *codec.shape), codec.dtype)
    got = episode.columns()
    for column, (shape, dtype) in wanted.items():
        values = got[column]
        if values.shape != shape or values.dtype != dtype:
            raise ValueError(f"{name}: {column} is {values.dtype} {values.shape}, expected {dtype} {shape}")
    for key, values in episode.obs.items():
        if values.dtype not in (np.uint8, np.float32):
            raise ValueError(f"{name}: observation {key!r} is {values.dtype}, expected uint8 images or float32 vectors")
