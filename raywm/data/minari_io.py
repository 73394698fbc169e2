"""Minari datasets, both ways: raywm -> Minari -> raywm gives the same bits, ids and infos.

Minari keeps T actions and rewards for T + 1 observations: its step t is what led to our row t + 1. Our row 0, whose
action is the codec's zero and whose reward is 0, has no place there and is made again on the way in.

A dataset of one column "vector" or "image" becomes a plain Box observation, others a Dict. Images are written without
Minari's JPEG, which would change them. Ids, infos and the card lie in Minari's metadata ("raywm_id", "raywm_info" of
an episode, "raywm" of the dataset), and the seed that each environment was reset with where Minari has it.

Where: OUT is a directory (then ``minari.MinariDataset("OUT/data")`` opens it), or a dataset id such as
"cartpole/random-v0": a relative path that ends in -vN and does not begin with a dot. An id lies in Minari's own place,
$MINARI_DATASETS_PATH or ~/.minari/datasets, and ``minari.load_dataset("cartpole/random-v0")`` opens it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from raywm.checkpoint import plain
from raywm.data.dataset import Columns, Dataset
from raywm.data.episode import Episode
from raywm.data.interchange import Progress, Source, _card, fresh
from raywm.spaces import ActionCodec, columns_from_json, obs_columns

ID = re.compile(r"(?![./~])[-\w/]+-v\d+")
PLACE = "MINARI_DATASETS_PATH"


def export_minari(dataset: Dataset, out: str, progress: Progress = lambda n: None) -> tuple[Path, str]:
    """Write a Minari dataset; returns where it lies and its Minari id.

    Raises ValueError without the `minari` extra, for a dataset whose spaces are not known, and for an episode whose
    first action is not the codec's zero (it would be lost).
    """
    minari = _minari()
    if dataset.columns is None or dataset.codec is None:
        raise ValueError(
            f"Minari needs the spaces, and {dataset.source} has neither dataset.json nor spaces.json; "
            "export the run or the dataset as a whole"
        )
    is_id = ID.fullmatch(out) is not None
    path = _home() / out if is_id else Path(out).expanduser().absolute()
    id = out if is_id else _id_of(path.name)
    card = _card(dataset)
    names: list[dict[str, str]] = []
    with fresh(path) as folder:
        with _place(folder / "scratch"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an author and a permalink, which nobody told us
            made = minari.create_dataset_from_buffers(
                dataset_id=id,
                buffer=_buffers(dataset, names, progress),
                action_space=dataset.codec.space,
                observation_space=_space(dataset.columns),
                algorithm_name=str(card["policy"]),
                description=f"written by raywm from {dataset.source}",
                jpeg_encoding=False,
            )
            if not names:
                raise ValueError("there is no episode to export; nothing was written")
            made.storage.update_episode_metadata(names)
            made.storage.update_metadata({"raywm": json.dumps(card)} | _env_spec(card["env"]))
            os.replace(made.storage.data_path, folder / "data")
        shutil.rmtree(folder / "scratch")
    return path, id


def import_minari(source: str, columns: Columns | None = None, codec: ActionCodec | None = None) -> Source:
    """A Minari dataset, ours or a foreign one: a directory (of it, or its data/) or the id of a local one.

    Of a foreign one: rewards become float32, float observations float32 vectors, an episode that Minari did not see end
    counts as truncated, and infos of steps are dropped. `columns`, `codec`: used instead of what it says.
    """
    minari = _minari()
    folder = next((p for p in (Path(source).expanduser() / "data", Path(source).expanduser()) if _is_data(p)), None)
    _refuse_to_make(folder or _home() / source / "data")
    try:
        made = minari.MinariDataset(folder) if folder else minari.load_dataset(source)
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no Minari dataset {source!r}, neither a directory nor in {_home()}; minari download {source}"
        ) from error
    raw = made.storage.metadata.get("raywm")
    card = json.loads(raw) if raw else {}
    if card.get("spaces"):
        columns = columns or columns_from_json(card["spaces"]["columns"])
        codec = codec or ActionCodec.from_json(card["spaces"]["action"])
    columns, codec = columns or obs_columns(made.observation_space), codec or ActionCodec(made.action_space)
    about = {key: card[key] for key in ("env", "policy", "seed", "stream")} if card else _foreign(made)
    notes = [] if card else ["infos of steps, if there are any, are not imported; rewards are float32"]
    return Source(_episodes(made, columns, codec, about), made.total_episodes, columns, codec, about, notes)


def _refuse_to_make(folder: Path) -> None:
    """Raise ValueError for a dataset that does not say its spaces: to find them Minari would make its environment, and
    so call whatever function of whatever module the file names."""
    try:
        said = json.loads((folder / "metadata.json").read_text())
        missing = [name for name in ("observation_space", "action_space") if not isinstance(said.get(name), str)]
    except FileNotFoundError:
        return  # Minari says so
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'metadata.json'} is damaged ({error})") from None
    if missing:
        raise ValueError(
            f"{folder} has no {' and no '.join(missing)}; Minari would call what its env_spec names to find out, which "
            "raywm does not let it: write the spaces into its metadata.json with minari.serialization.serialize_space"
        )


def _minari() -> Any:
    try:
        import h5py  # noqa: F401
        import minari
    except ImportError as error:
        raise ValueError(
            f'Minari datasets need what is not installed ({error}); pip install "raywm[minari]" (Python >= 3.11)'
        ) from None
    return minari


def _home() -> Path:
    return Path(os.environ.get(PLACE) or Path.home() / ".minari" / "datasets")


@contextlib.contextmanager
def _place(path: Path) -> Iterator[None]:
    """Minari writes only into the place that its environment variable names."""
    before = os.environ.get(PLACE)
    os.environ[PLACE] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ[PLACE]
        else:
            os.environ[PLACE] = before


def _id_of(name: str) -> str:
    name = re.sub(r"[^-\w]", "-", name)
    return name if re.fullmatch(r".*-v\d+", name) else f"{name}-v0"


def _space(columns: Columns) -> gym.Space:
    """The observation space whose columns these are: plain where it is one under its usual name."""
    if len(columns) == 1:
        ((name, box),) = columns.items()
        if list(obs_columns(box)) == [name]:
            return box
    return gym.spaces.Dict(dict(columns))


def _env_spec(env: dict[str, Any] | None) -> dict[str, str]:
    """So that Minari can make the environment again, where it is a registered one without our wrappers."""
    if env is None or any(value for key, value in env.items() if key not in ("id", "kwargs", "action_repeat")):
        return {}
    if env.get("action_repeat") not in (None, 1):
        return {}
    try:
        spec = copy.deepcopy(gym.spec(env["id"]))  # gymnasium's registry hands out its own
        spec.kwargs = {**spec.kwargs, **(env.get("kwargs") or {})}
        return {"env_spec": spec.to_json()}
    except (gym.error.Error, TypeError, ValueError):
        return {}  # not gymnasium's to make


def _buffers(dataset: Dataset, names: list[dict[str, str]], progress: Progress) -> Iterator[Any]:
    """Minari's episodes, one at a time; what they are called goes into `names`."""
    from minari.data_collector import EpisodeBuffer

    assert dataset.columns is not None and dataset.codec is not None
    plain_space = not isinstance(_space(dataset.columns), gym.spaces.Dict)
    zero = dataset.codec.zero()
    for episode in dataset:
        if episode.action[0].tobytes() != zero.tobytes():
            raise ValueError(
                f"episode {episode.id!r}, row 0: action is {episode.action[0]}, expected {zero}: no action led there"
            )
        seed = episode.info.get("seed")
        names.append({"raywm_id": episode.id, "raywm_info": json.dumps(episode.info)})
        yield EpisodeBuffer(
            seed=seed if isinstance(seed, int) else None,
            observations=next(iter(episode.obs.values())) if plain_space else dict(episode.obs),
            actions=episode.action[1:],
            rewards=episode.reward[1:],  # type: ignore[arg-type]
            terminations=episode.is_terminal[1:],  # type: ignore[arg-type]
            truncations=(episode.is_last & ~episode.is_terminal)[1:],  # type: ignore[arg-type]
        )
        progress(1)


def _is_data(path: Path) -> bool:
    return (path / "metadata.json").is_file()


def _foreign(made: Any) -> dict[str, Any]:
    spec = made.env_spec
    env = {"id": spec.id, "kwargs": plain(spec.kwargs)} if spec is not None else None
    return {"env": env, "policy": made.storage.metadata.get("algorithm_name", "unknown"), "stream": "minari"}


def _episodes(made: Any, columns: Columns, codec: ActionCodec, about: dict[str, Any]) -> Iterator[Episode]:
    metas = made.storage.get_episode_metadata(made.episode_indices)
    for number, (data, meta) in enumerate(zip(made.iterate_episodes(), metas)):
        id = meta.get("raywm_id")
        if id is None:
            id = f"minari-{number:09d}"
            info: dict[str, Any] = {"number": number, "env": (about["env"] or {}).get("id"), "policy": about["policy"]}
            info |= {"source": made.spec.dataset_id, "seed": plain(meta.get("seed"))}
        else:
            info = json.loads(meta["raywm_info"])
        yield _episode(str(id), info, data, columns, codec)


def _episode(id: str, info: dict[str, Any], data: Any, columns: Columns, codec: ActionCodec) -> Episode:
    rows = len(data.rewards) + 1
    parts = data.observations if isinstance(data.observations, dict) else dict.fromkeys(columns, data.observations)
    unknown = sorted(set(columns) - set(parts))
    if unknown:
        raise ValueError(f"episode {id!r} lacks the observation {unknown[0]!r}, it has {sorted(parts)}")
    try:
        obs = {
            name: np.ascontiguousarray(parts[name], box.dtype).reshape(-1, *box.shape) for name, box in columns.items()
        }
        action = np.empty((rows, *codec.shape), codec.dtype)
        action[0], action[1:] = codec.zero(), data.actions
    except ValueError as error:
        raise ValueError(f"episode {id!r} does not fit the spaces: {error}") from None
    terminal = np.concatenate([[False], np.asarray(data.terminations, bool)])
    if terminal[:-1].any():
        raise ValueError(f"episode {id!r}: step {int(terminal.argmax())} of {rows - 1} is terminal, expected the last")
    first, last = np.zeros(rows, bool), np.zeros(rows, bool)
    first[0] = last[-1] = True
    reward = np.concatenate([[0], np.asarray(data.rewards, np.float32)]).astype(np.float32)
    return Episode(id, obs, action, reward, first, last, terminal, info)
