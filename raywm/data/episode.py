"""An episode, its timing rule, and its Arrow form.

The timing rule: row t is everything that arrived together with observation t. ``action[t]`` is the action that LED
here and ``reward[t]`` was received on arriving. Row 0 has the zero action and zero reward and is ``is_first``; the
final observation is kept, so T rows hold T - 1 transitions. ``is_last = terminated or truncated``,
``is_terminal = terminated`` only: a truncated episode bootstraps, a terminated one does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa

from raywm.spaces import ActionCodec

FLAGS = ("is_first", "is_last", "is_terminal")
META = b"raywm"  # the key of the JSON in an Arrow schema's metadata: {"pieces": headers, "common"}
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
    """An episode, or the piece [first_row, stop) of it, as a block of one piece: see ``to_block``."""
    columns = {name: column[first_row:stop] for name, column in episode.columns().items()}
    rows = len(columns["reward"])
    return to_block(columns, [piece_header(episode.id, first_row, rows, _last(columns), episode.info)])


def piece_header(id: str, first_row: int, rows: int, last: bool, info: dict[str, Any]) -> dict[str, Any]:
    """What a block says of one of its pieces: rows [first_row, first_row + rows) of episode `id`, `last` if it ends.

    A piece without rows marks an episode that broke and is kept out; its info says why.
    """
    return {"id": id, "first_row": first_row, "rows": rows, "last": last, "info": info}


def to_block(
    columns: Mapping[str, np.ndarray], pieces: Sequence[dict[str, Any]], common: dict[str, Any] | None = None
) -> pa.Table:
    """Pieces of episodes as one table: what collectors send, and what a store appends as one record batch.

    Args:
        columns: (N, *) by stored name, in stored order (``Episode.columns``): the rows of all pieces.
        pieces: their headers (``piece_header``), in the order of their rows, which add up to N.
        common: what all these pieces share (their collector, the environment's config); JSON, part of every info.
    """
    arrays = {name: _to_arrow(column) for name, column in columns.items()}
    meta = {"pieces": list(pieces), "common": common or {}}
    return pa.table(arrays).replace_schema_metadata({META: json.dumps(meta).encode()})


def join(episodes: Sequence[Episode]) -> pa.Table:
    """Whole episodes as one block."""
    parts = [episode.columns() for episode in episodes]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return to_block(columns, [piece_header(e.id, 0, len(e), _last(e.columns()), e.info) for e in episodes])


def from_table(table: pa.Table | pa.RecordBatch) -> Episode:
    """The episode (or piece) in a table of one. Columns are read-only views of its memory where Arrow allows."""
    meta = table_meta(table)
    if len(meta["pieces"]) != 1:
        raise ValueError(f"a block of {len(meta['pieces'])} pieces, expected one; use from_block")
    (piece,) = meta["pieces"]
    return from_arrow(table, piece["id"], meta["common"] | piece["info"])


def from_block(table: pa.Table | pa.RecordBatch) -> list[Episode]:
    """The episodes (or pieces) in a block, as read-only views of its memory; marks of broken episodes are left out."""
    meta, columns = table_meta(table), from_columns(table)
    ends = np.cumsum([piece["rows"] for piece in meta["pieces"]], dtype=np.int64)
    if (ends[-1] if len(ends) else 0) != table.num_rows:
        raise ValueError(f"a block of {table.num_rows} rows whose pieces have {ends[-1:]}")
    return [
        cut(columns, piece["id"], int(end) - piece["rows"], int(end), meta["common"] | piece["info"])
        for piece, end in zip(meta["pieces"], ends)
        if piece["rows"]
    ]


def table_meta(table: pa.Table | pa.RecordBatch) -> dict[str, Any]:
    """{"pieces": headers, "common"} of a block."""
    raw = (table.schema.metadata or {}).get(META)
    if raw is None:
        raise ValueError(f"table has no {META.decode()!r} schema metadata; expected one made by to_table(episode)")
    meta: dict[str, Any] = json.loads(raw)
    return meta


def _last(columns: Mapping[str, np.ndarray]) -> bool:
    return len(columns["is_last"]) > 0 and bool(columns["is_last"][-1])


def from_arrow(table: pa.Table | pa.RecordBatch, id: str, info: dict[str, Any]) -> Episode:
    """An episode from Arrow columns whose id and info travel elsewhere."""
    return cut(from_columns(table), id, 0, table.num_rows, info)


def from_columns(table: pa.Table | pa.RecordBatch) -> dict[str, np.ndarray]:
    """A table's columns by stored name, flags as bool."""
    missing = [name for name in ("action", "reward", *FLAGS) if name not in table.schema.names]
    if missing:
        raise ValueError(f"a table of episodes lacks {missing}, got columns {table.schema.names}")
    columns = {name: _from_arrow(table.column(name)) for name in table.schema.names}
    return columns | {flag: columns[flag].view(bool) for flag in FLAGS}


def cut(columns: Mapping[str, np.ndarray], id: str, start: int, stop: int, info: dict[str, Any]) -> Episode:
    """Rows [start, stop) of stored columns as an episode: views."""
    part = {name: column[start:stop] for name, column in columns.items()}
    obs = {name[len(OBS) :]: column for name, column in part.items() if name.startswith(OBS)}
    return Episode(id, obs, part["action"], part["reward"], info=info, **{flag: part[flag] for flag in FLAGS})


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


def validate_block(
    columns: Mapping[str, np.ndarray],
    pieces: Sequence[Mapping[str, Any]],
    boxes: Mapping[str, gym.spaces.Box] | None = None,
    codec: ActionCodec | None = None,
) -> None:
    """``validate`` for all pieces of a block, at the price of one: what is wrong is looked for only if something is."""
    ends = np.cumsum([head["rows"] for head in pieces], dtype=np.int64)
    if not pieces or len(columns["reward"]) != ends[-1] or min(head["rows"] for head in pieces) < 0:
        raise ValueError(f"a block of {len(columns['reward'])} rows whose pieces have {[h['rows'] for h in pieces]}")
    whole = cut(columns, "block", 0, int(ends[-1]), {})
    if _keeps_the_rule(whole, pieces, ends):
        for head in pieces:
            if not isinstance(head["id"], str) or not head["id"]:
                raise ValueError(f"episode id is {head['id']!r}, expected a non-empty string")
        _validate_types(whole, f"episode {pieces[0]['id']!r}", boxes, codec)
        return
    for head, end in zip(pieces, ends.tolist()):
        if head["rows"]:
            piece = cut(columns, head["id"], end - head["rows"], end, {})
            validate(piece, boxes, codec, head["first_row"], head["last"])
    raise ValueError(f"block of episode {pieces[0]['id']!r} and {len(pieces) - 1} others breaks the timing rule")


def _keeps_the_rule(whole: Episode, pieces: Sequence[Mapping[str, Any]], ends: np.ndarray) -> bool:
    columns = whole.columns()
    if any(len(column) != len(whole) for column in columns.values()):
        return False
    if any(column.dtype.kind == "f" and not np.isfinite(column).all() for column in columns.values()):
        return False
    if any(head["rows"] and head["last"] and head["first_row"] + head["rows"] < 2 for head in pieces):
        return False
    first, last = np.zeros(len(whole), bool), np.zeros(len(whole), bool)
    first[[int(end) - head["rows"] for head, end in zip(pieces, ends) if head["rows"] and head["first_row"] == 0]] = (
        True
    )
    last[[int(end) - 1 for head, end in zip(pieces, ends) if head["rows"] and head["last"]]] = True
    return bool(
        (whole.is_first == first).all()
        and (whole.is_last == last).all()
        and not (whole.is_terminal & ~last).any()
        and not whole.reward[first].any()
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
