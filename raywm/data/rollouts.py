"""Recordings of the two classic World Models repositories, folders of .npz files, one an episode.

They keep other times than our rule (row t: observation t with the action that LED to it and the reward on arriving):

**ctallec/world-models** (data/carracing.py: rollout_*.npz with observations, rewards, actions, terminals). Entry t of
every array belongs to one call of ``env.step(actions[t])``: observations[t] is what came AFTER actions[t]. What reset
gave was never kept. So entry t is our row t; on entry 0, our first row, the action and the reward are dropped, and
episodes begin one step late. All planned actions are in the file, those after the end are dropped.

**hardmaru/WorldModelsExperiments** (carracing/extract.py, doomrnn/extract.py: record/*.npz with obs, action).
action[t] was chosen ON obs[t]. So obs[t] is our row t and action[t] is row t + 1's; the last action is dropped, because
what it led to was not kept. There are no rewards in these files: all are 0. Nor is there an end: a recording that is
shorter than the time limit died on the action that is dropped, so its last row, one step too early, is terminal.
(Where a fork's files have reward and done, these are of the action too, and go to row t + 1.)

In both an episode as long as the time limit was truncated, not terminated: gym's old `done` said the same for both.
The limit is that of the environment given, or of the recordings: 1000 for CarRacing, 2100 for Doom's single action.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from raywm.checkpoint import open_npz
from raywm.data.dataset import Columns
from raywm.data.episode import Episode
from raywm.data.interchange import Source
from raywm.spaces import ActionCodec, obs_columns

STEP = {"observations", "rewards", "actions", "terminals"}
RECORD = {"obs", "action"}
LIMIT, DOOM_LIMIT = 1000, 2100  # steps


def import_rollouts(
    source: str | Path,
    columns: Columns | None = None,
    codec: ActionCodec | None = None,
    limit: int | None = None,
    env: dict[str, Any] | None = None,
) -> Source:
    """Episodes of a folder of .npz files, sub-folders included, in the order of their names.

    columns, codec, limit: of the environment; without them they are inferred: a Box from the least to the greatest
    action, or a Discrete for whole numbers. Raises ValueError for files of another kind, naming the file.
    """
    folder = Path(source).expanduser()
    files = sorted(folder.rglob("*.npz"), key=_natural)
    if not files:
        raise ValueError(f"no .npz files in {source}, expected rollout_*.npz (ctallec) or record/*.npz (hardmaru)")
    kind = _kind(files[0])
    notes = _notes(kind, files[0])
    if codec is None:
        codec = _infer_codec(files)
        notes.append(f"action space {codec.space}, inferred from what was done; give --env for the true one")
    if columns is None:
        with _opened(files[0]) as data:
            obs = data["observations" if kind is STEP else "obs"]
        low, high = (0, 255) if obs.dtype == np.uint8 else (-np.inf, np.inf)
        columns = obs_columns(gym.spaces.Box(low, high, obs.shape[1:], obs.dtype.type))
    if limit is None:
        limit = DOOM_LIMIT if kind is RECORD and _single_action(files[0]) else LIMIT
        notes.append(f"episodes of {limit} steps count as truncated, shorter ones as terminated")
    about = {"env": env, "policy": "unknown", "stream": "rollout"}
    return Source(_episodes(folder, files, kind, columns, codec, limit), len(files), columns, codec, about, notes)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with open_npz(path) as data:
            yield data
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _natural(path: Path) -> list[Any]:
    return [[int(p) if p.isdigit() else p for p in re.split(r"(\d+)", part)] for part in path.parts]


def _kind(path: Path) -> set[str]:
    with _opened(path) as data:
        names = set(data.files)
    for kind in (STEP, RECORD):
        if kind <= names:
            return kind
    raise ValueError(f"{path} holds {sorted(names)}, expected {sorted(STEP)} (ctallec) or {sorted(RECORD)} (hardmaru)")


def _notes(kind: set[str], path: Path) -> list[str]:
    if kind is STEP:
        return ["the first observations were not recorded: each episode begins one step late, without that reward"]
    with _opened(path) as data:
        rewards = [] if "reward" in data.files else ["there are no rewards in these files: all are 0"]
    return ["what the last actions led to was not recorded: each episode ends one step early", *rewards]


def _single_action(path: Path) -> bool:
    with _opened(path) as data:
        return data["action"].ndim == 1


def _infer_codec(files: list[Path]) -> ActionCodec:
    low: Any = None
    high: Any = None
    dtype: Any = None
    for path in files:
        with _opened(path) as data:
            action = data["actions" if "actions" in data.files else "action"]
        if low is not None and action.shape[1:] != low.shape:
            raise ValueError(f"{path}: actions are {action.shape[1:]}, expected {low.shape} as in {files[0]}")
        least, most = action.min(0), action.max(0)
        low, high = (least, most) if low is None else (np.minimum(low, least), np.maximum(high, most))
        dtype = action.dtype
    if dtype.kind in "iu" and low.shape == ():
        return ActionCodec(gym.spaces.Discrete(max(int(high) + 1, 2)))
    shape = low.shape or (1,)
    low, high = (np.asarray(v, np.float32).reshape(shape) for v in (low, high))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(f"actions in {files[0].parent} are NaN or infinite, expected finite numbers")
    return ActionCodec(gym.spaces.Box(low, high, dtype=np.float32))


def _episodes(
    folder: Path, files: list[Path], kind: set[str], columns: Columns, codec: ActionCodec, limit: int
) -> Iterator[Episode]:
    for number, path in enumerate(files):
        info = {"number": number, "policy": "unknown", "source": str(path.relative_to(folder))}
        try:
            with open_npz(path) as data:
                missing = sorted(kind - set(data.files))
                if missing:
                    raise ValueError(f"it lacks {missing}, which {files[0].name} has")
                parts = {name: data[name] for name in data.files}
            obs, action, reward, ended = (_from_steps if kind is STEP else _from_record)(parts, limit)
            yield _episode(f"rollout-{number:09d}", info, obs, action, reward, ended, columns, codec)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: {error}") from error


Rows = tuple[np.ndarray, np.ndarray, np.ndarray, bool]  # obs, action (of row 1 on), reward (of row 1 on), terminated


def _from_steps(parts: dict[str, np.ndarray], limit: int) -> Rows:
    obs = parts["observations"]
    rows = len(obs)
    done = bool(parts["terminals"][rows - 1 : rows].any())
    return obs, parts["actions"][1:rows], parts["rewards"][1:rows], done and rows < limit  # entry t is step t + 1


def _from_record(parts: dict[str, np.ndarray], limit: int) -> Rows:
    obs, action = parts["obs"], parts["action"]
    rows = len(obs)
    reward = parts["reward"][: rows - 1] if "reward" in parts else np.zeros(max(rows - 1, 0))
    done = bool(parts["done"][rows - 1 : rows].any()) if "done" in parts else True
    return obs, action[: rows - 1], reward, done and rows < limit  # rows: the actions taken, the dropped one with them


def _episode(
    id: str,
    info: dict[str, Any],
    obs: np.ndarray,
    action: np.ndarray,
    reward: np.ndarray,
    ended: bool,
    columns: Columns,
    codec: ActionCodec,
) -> Episode:
    rows = len(obs)
    if len(columns) != 1:
        raise ValueError(f"it has one observation, the environment has {sorted(columns)}; leave --env out")
    ((name, box),) = columns.items()
    if obs.shape[1:] != box.shape or (obs.dtype == np.uint8) != (box.dtype == np.uint8):
        raise ValueError(
            f"observations are {obs.dtype} {obs.shape[1:]}, the environment's {box.dtype} {box.shape}; leave --env out"
        )
    if action.dtype.kind == "f" and codec.kind != "box":
        raise ValueError(f"actions are {action.dtype} numbers, the environment takes {codec.space}; leave --env out")
    if len(action) != rows - 1 or len(reward) != rows - 1:
        raise ValueError(f"{rows} observations with {len(action) + 1} actions and {len(reward) + 1} rewards")
    actions = np.empty((rows, *codec.shape), codec.dtype)
    actions[0], actions[1:] = codec.zero(), action.reshape(rows - 1, *codec.shape)
    first, last, terminal = np.zeros((3, rows), bool)
    first[0] = last[-1] = True
    terminal[-1] = ended
    rewards = np.concatenate([[0], reward]).astype(np.float32)
    return Episode(id, {name: obs.astype(box.dtype, copy=False)}, actions, rewards, first, last, terminal, info)
