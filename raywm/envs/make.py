"""One way to make any environment: by gymnasium id or "module:EnvClass", with dict observations of named columns."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import shlex
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from raywm.spaces import is_image, obs_columns, to_columns

# What ids need before gymnasium knows them: (prefix, module to import, what brings it).
PLUGINS = (
    ("Vizdoom", "vizdoom.gymnasium_wrapper", "raywm[doom]"),
    ("ALE/", "ale_py", "raywm[atari]"),
    ("dm_control/", "raywm.envs.dmc", "raywm[dmc]"),
    ("Crafter", "raywm.envs.crafter", "raywm[crafter]"),
)
# What gymnasium's own families need, by a word in their entry point.
FAMILIES = (
    ("box2d", "raywm[box2d]"),
    ("mujoco", "raywm[mujoco]"),
    ("phys2d", "gymnasium[jax]"),
    ("tabular", "gymnasium[jax]"),
    ("ale_py", "raywm[atari]"),
    ("vizdoom", "raywm[doom]"),
)
# Arguments of gymnasium.wrappers.AtariPreprocessing, which may stand among an Atari game's own.
ATARI = ("noop_max", "frame_skip", "screen_size", "terminal_on_life_loss", "grayscale_obs")
DEFAULTS: dict[str, Any] = {
    "id": None,
    "kwargs": {},
    "crop": None,
    "resize": None,
    "grayscale": False,
    "action_repeat": 1,
    "time_limit": None,
}


def make_env(env: Any, render: bool = False) -> Columns:
    """An environment whose observations are a dict of columns (see ``raywm.spaces.obs_columns``); choices, coins, whole
    numbers and tuples of them come as vectors (see ``Vectors``).

    `env` is an EnvConfig or a dict with its keys:

    - ``id``: a gymnasium id, or "module:EnvClass"; ``kwargs``: arguments of its constructor. For ``ALE/...`` those of
      ``gymnasium.wrappers.AtariPreprocessing`` too, which then skips the frames (``frame_skip``, default 4), shows the
      maximum of the last two (in colour, unless grayscale_obs) and begins with 1 to ``noop_max`` steps of nothing
    - ``crop``: pixels cut off images at the (top, bottom, left, right); ``resize``: then scaled to (height, width);
      ``grayscale``: then to one channel
    - ``action_repeat``: an action is applied this many times, or until the episode ends; rewards are summed
    - ``time_limit``: the episode is truncated after this many of the environment's OWN steps, before any repeat; it
      replaces the limit registered with the id. With action_repeat=4, time_limit=2100 gives at most 525 steps.

    `render`: makes ``env.render()`` return frames for videos. Raises ValueError for unknown ids, missing extras and
    unsupported observations.
    """
    cfg = _settings(env)
    if not render:
        # Pixels are drawn off screen; without this SDL looks for a display that clusters do not have.
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    made = _make(cfg, render)
    for space in ("observation_space", "action_space"):
        if not isinstance(getattr(made, space, None), gym.Space):
            raise ValueError(
                f"environment {cfg['id']!r} has no {space}, expected a gymnasium.Space; give its class one"
            )
    if _is_doom(made):
        made = Doom(made)
    if cfg["action_repeat"] > 1:
        made = ActionRepeat(made, cfg["action_repeat"])
    if any(map(_is_numbers, _parts(made.observation_space).values())):
        made = Vectors(made)
    return Columns(made, cfg["crop"], cfg["resize"], cfg["grayscale"])


def _settings(env: Any) -> dict[str, Any]:
    if isinstance(env, Mapping):
        unknown = sorted(set(env) - set(DEFAULTS))
        if unknown:
            near = difflib.get_close_matches(unknown[0], DEFAULTS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f", expected some of {list(DEFAULTS)}"
            raise ValueError(f"unknown environment key {unknown[0]!r}{hint}")
        cfg = DEFAULTS | dict(env)
    else:
        cfg = {key: getattr(env, key, default) for key, default in DEFAULTS.items()}
    if not isinstance(cfg["id"], str) or not cfg["id"]:
        raise ValueError(f"environment id is {cfg['id']!r}, expected a gymnasium id or 'module:EnvClass'")
    for key in ("action_repeat", "time_limit"):
        if cfg[key] is not None and cfg[key] < 1:
            raise ValueError(f"{key} is {cfg[key]}, expected at least 1")
    cfg["kwargs"], cfg["action_repeat"] = dict(cfg["kwargs"] or {}), cfg["action_repeat"] or 1
    return cfg


def _make(cfg: dict[str, Any], render: bool) -> gym.Env:
    id, limit, kwargs = cfg["id"], cfg["time_limit"], dict(cfg["kwargs"])
    if render:
        kwargs.setdefault("render_mode", "rgb_array")
    program = next((key for key in kwargs if key.replace("_", "").lower() == "vizdoompath"), None)
    if program:  # ViZDoom takes its settings in any spelling
        raise ValueError(
            f"env.kwargs.{program} names a program to run, which a config may not; install that ViZDoom, or make the "
            "environment in a class of a module of your own (env.id=module:EnvClass)"
        )
    env_class = _class(id)
    if env_class is not None:
        try:
            env = env_class(**kwargs)
        except Exception as error:
            raise _not_made(id, kwargs, error) from error
        return env if limit is None else gym.wrappers.TimeLimit(env, limit)

    spec = _spec(id)
    entry = str(spec.entry_point)
    try:
        if "vizdoom" in entry and os.name == "posix":
            return _make_doom(id, limit, kwargs)
        if "ale_py" in entry and not set(ATARI).isdisjoint(kwargs):
            return _make_atari(spec, limit, kwargs)
        env = gym.make(spec, max_episode_steps=limit, disable_env_checker=True, **kwargs)
        return FreshWorld(env) if entry.startswith("gymnasium.envs.box2d") else env
    except (gym.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        what = next((what for word, what in FAMILIES if word in entry), None)
        fix = f'pip install "{what}"' if what else "install what it names"
        raise ValueError(f"environment {id!r} needs more than is installed ({error}); {fix}") from error
    except Exception as error:
        raise _not_made(id, kwargs, error) from error


def _not_made(id: str, kwargs: dict[str, Any], error: Exception) -> ValueError:
    """What the environment's own code raised, in one line; --debug shows where."""
    return ValueError(
        f"environment {id!r} cannot be made with kwargs {kwargs}: {type(error).__name__}: {error}; "
        "look at env.kwargs, or at the environment (raywm --debug ... shows the traceback)"
    )


def _class(id: str) -> type | None:
    """The class of "module:EnvClass", or None where `id` is for gymnasium to find."""
    module_name, colon, name = id.partition(":")
    if not colon:
        return None
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"environment id is {id!r}, expected 'module:EnvClass', the module as import names it")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing == module_name or missing and module_name.startswith(f"{missing}."):
            plain = module_name.removesuffix(".py")
            said = f"there is no module {module_name!r}; " + (
                f"did you mean '{plain}:{name}'?" if plain != module_name else "put it on PYTHONPATH or install it"
            )
        else:  # the module is there, and it or something that it imports is broken
            said = (
                f"module {module_name!r} cannot be imported: {type(error).__name__}: {error}; mend it, or install that"
            )
        raise ValueError(f"environment {id!r}: {said}") from error
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, gym.Env):
        return found
    if id in gym.registry or name in gym.registry:  # gymnasium's own "module to import first:id"
        return None
    names = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, gym.Env) and v is not gym.Env]
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {names[:8]}" if names else "it has none"
    raise ValueError(f"environment {id!r}: {module_name} has no gymnasium.Env class {name!r}; {hint}")


def _spec(id: str) -> gym.envs.registration.EnvSpec:
    name = id.partition(":")[2] or id
    for prefix, module, package in PLUGINS:
        if name.startswith(prefix):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                raise ValueError(f'environment {id!r} needs {error.name}; pip install "{package}"') from error
            except Exception as error:  # versions that do not go together, a system library that is not there
                raise ValueError(
                    f"environment {id!r}: {module} cannot be imported: {type(error).__name__}: {error}; "
                    f'pip install --upgrade "{package}"'
                ) from error
    try:
        return gym.spec(name)
    except (gym.error.UnregisteredEnv, gym.error.Error) as error:
        lower = {known.lower(): known for known in gym.registry}
        near = [lower[m] for m in difflib.get_close_matches(name.lower(), lower, 3, 0.5)]
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see gymnasium.pprint_registry()"
        raise ValueError(f"unknown environment {id!r}; {hint}") from error


class Columns(gym.ObservationWrapper):
    """Observations as a dict of columns, with the image ones cropped, resized and made grey.

    Every array is the caller's own: an environment that reuses its buffer cannot change a stored row.

    ``plain``: the one column that an observation of its shape already is, or None.
    """

    def __init__(
        self,
        env: gym.Env,
        crop: tuple[int, int, int, int] | None,
        resize: tuple[int, int] | None,
        grayscale: bool,
    ):
        super().__init__(env)
        self._raw = obs_columns(env.observation_space)
        self.crop, self.size, self.grayscale = crop, resize, grayscale
        images = [name for name, box in self._raw.items() if is_image(box)]
        if not images and (crop or resize or grayscale):
            raise ValueError(f"crop, resize and grayscale are for images, got columns {list(self._raw)}; remove them")
        if resize and importlib.util.find_spec("cv2") is None:
            raise ValueError("resize needs OpenCV; pip install opencv-python-headless")
        self._images = images if crop or resize or grayscale else []
        several = isinstance(env.observation_space, gym.spaces.Dict)
        self.plain = None if several or self._images else next(iter(self._raw))
        boxes: dict[str, gym.Space] = dict(self._raw)
        for name in self._images:
            height, width, channels = self._raw[name].shape
            top, bottom, left, right = crop or (0, 0, 0, 0)
            if top + bottom >= height or left + right >= width or min(top, bottom, left, right) < 0:
                raise ValueError(
                    f"crop {crop} leaves nothing of {name!r}, {height} pixels high and {width} wide; "
                    "expected pixels to cut off at the (top, bottom, left, right)"
                )
            if grayscale and channels not in (1, 3):
                raise ValueError(f"grayscale needs 1 or 3 channels, {name!r} has {channels}; turn it off")
            shape = resize or (height - top - bottom, width - left - right)
            boxes[name] = gym.spaces.Box(0, 255, (*shape, 1 if grayscale else channels), np.uint8)
        self.observation_space = gym.spaces.Dict(boxes)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        if isinstance(action, np.ndarray) and action.ndim == 0:
            action = action[()]  # some environments take a 0-d array for a vector of buttons
        return super().step(action)

    def observation(self, observation: Any) -> dict[str, np.ndarray]:
        return {name: np.array(column, order="C") for name, column in self.columns(observation).items()}

    def columns(self, observation: Any) -> dict[str, np.ndarray]:
        """What `env` observes, as columns that may be views of its memory: for a caller that copies them anyway."""
        columns = to_columns(self._raw, observation)
        for name in self._images:
            columns[name] = self._image(columns[name])
        return columns

    def write(self, observation: Any, now: Mapping[str, np.ndarray], row: int) -> None:
        """`columns` into row `row` of `now` {column: (rows, *)}, images resized in their place."""
        for name, column in to_columns(self._raw, observation).items():
            place = now[name][row]
            if name in self._images:
                column = self._image(column, place)
            if column is not place:
                place[...] = column

    def _image(self, image: np.ndarray, place: np.ndarray | None = None) -> np.ndarray:
        """`image` as it is stored, in `place` (which is returned) where OpenCV can write it there."""
        if self.crop:
            top, bottom, left, right = self.crop
            image = image[top : image.shape[0] - bottom, left : image.shape[1] - right]
        if self.size:
            import cv2

            height, width = self.size
            place = None if self.grayscale else place
            image = cv2.resize(np.ascontiguousarray(image), (width, height), place, interpolation=cv2.INTER_AREA)
            if image is place:
                return image
            image = image.reshape(height, width, -1)  # cv2 drops a single channel
        if self.grayscale and image.shape[2] == 3:
            # ITU-R 601 luma in integers, so that every machine gives the same bytes
            image = ((image.astype(np.uint32) @ np.array([299, 587, 114], np.uint32) + 500) // 1000)[..., None]
            image = image.astype(np.uint8)
        return image


def _parts(space: gym.Space) -> dict[Any, gym.Space]:
    return dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {None: space}


def _is_numbers(space: gym.Space) -> bool:
    """Whether a space is no column as it is, and a vector once it is flattened."""
    if isinstance(space, gym.spaces.Box):
        image = space.dtype == np.uint8 and len(space.shape) in (2, 3)
        return np.dtype(space.dtype).kind in "iub" and not image
    if isinstance(space, (gym.spaces.Tuple, gym.spaces.Dict)):
        parts = list(space.spaces.values() if isinstance(space, gym.spaces.Dict) else space.spaces)
        return bool(parts) and all(_is_numbers(part) or _is_floats(part) for part in parts)
    return isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary))


def _is_floats(space: gym.Space) -> bool:
    return isinstance(space, gym.spaces.Box) and np.dtype(space.dtype).kind == "f"


class Vectors(gym.ObservationWrapper):
    """Choices, coins, whole numbers and tuples of such as float32 vectors, by ``gymnasium.spaces.flatten``: a choice of
    n is a one-hot of n."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        parts = _parts(env.observation_space)
        self._flat = {name: space for name, space in parts.items() if _is_numbers(space)}
        for name, space in self._flat.items():
            flat = gym.spaces.flatten_space(space)
            assert isinstance(flat, gym.spaces.Box)
            parts[name] = gym.spaces.Box(flat.low.astype(np.float32), flat.high.astype(np.float32), dtype=np.float32)
        self.observation_space = parts[None] if None in parts else gym.spaces.Dict(parts)

    def observation(self, observation: Any) -> Any:
        if None in self._flat:
            return self._vector(None, observation)
        return {k: self._vector(k, v) if k in self._flat else v for k, v in observation.items()}

    def _vector(self, name: str | None, value: Any) -> np.ndarray:
        return np.asarray(gym.spaces.flatten(self._flat[name], value), np.float32)


class ActionRepeat(gym.Wrapper):
    """Apply an action `times` times, or until the episode ends, and sum the rewards."""

    def __init__(self, env: gym.Env, times: int):
        super().__init__(env)
        self.times = times

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        total = 0.0
        for _ in range(self.times):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class FreshWorld(gym.Wrapper):
    """A new Box2D world for every episode.

    gymnasium's BipedalWalker and CarRacing play all episodes in one world, whose solver remembers: an episode would
    depend on those before it, and so on how episodes are dealt to workers.
    """

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        import Box2D

        base: Any = self.env.unwrapped
        base._destroy()
        listener = getattr(base, "contactListener_keepref", None)
        base.world = Box2D.b2World(gravity=base.world.gravity, contactListener=listener)
        return self.env.reset(**kwargs)


def _make_atari(spec: gym.envs.registration.EnvSpec, limit: int | None, kwargs: dict[str, Any]) -> gym.Env:
    """An Atari game whose frames gymnasium's wrapper skips and pools, so that the game itself must not."""
    frames = {"screen_size": 64, "grayscale_obs": False} | {key: kwargs.pop(key) for key in ATARI if key in kwargs}
    if kwargs.setdefault("frameskip", 1) != 1:
        raise ValueError(f"frameskip is {kwargs['frameskip']} beside {sorted(frames)}; give frame_skip instead")
    env = gym.make(spec, max_episode_steps=limit, disable_env_checker=True, **kwargs)
    return gym.wrappers.AtariPreprocessing(env, **frames)


def _is_doom(env: gym.Env) -> bool:
    return any(c.__module__.startswith("vizdoom.") for c in type(env.unwrapped).__mro__)


# $$ is the engine after exec. The engine outlives a killed parent for ever, so somebody has to watch.
LAUNCHER = """#!/bin/sh
cd {home} || exit 1
(
  while kill -0 $PPID; do kill -0 $$ || exit; sleep 2; done
  kill -9 $$
  rm -rf {home}
) </dev/null >/dev/null 2>&1 &
exec {engine} "$@"
"""


def _make_doom(id: str, limit: int | None, kwargs: dict[str, Any]) -> gym.Env:
    """ViZDoom whose engine runs in a directory of its own and dies with its owner.

    The engine leaves `_vizdoom` and `_vizdoom.ini` in its working directory, and several engines in one directory
    share (and race for) that settings file. It is another process, so a launcher that changes the directory first
    keeps ours.
    """
    import vizdoom

    home = tempfile.TemporaryDirectory(prefix="raywm-doom-", ignore_cleanup_errors=True)
    launcher, engine = Path(home.name) / "vizdoom", Path(vizdoom.__file__).parent / "vizdoom"
    launcher.write_text(LAUNCHER.format(home=shlex.quote(home.name), engine=shlex.quote(str(engine))))
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
    for key, value in kwargs.items():  # the engine's directory is not the one that relative paths were meant for
        if key.endswith("_path") and isinstance(value, str) and os.path.exists(value):
            kwargs[key] = os.path.abspath(value)
    env = gym.make(id, max_episode_steps=limit, disable_env_checker=True, vizdoom_path=str(launcher), **kwargs)
    env.unwrapped.raywm_home = home  # type: ignore[attr-defined]  # removed with the environment
    return env


DOOM_COLUMNS = {"screen": "image", "gamevariables": "vector"}


class Doom(gym.Wrapper):
    """ViZDoom under the timing rule: named columns, no black last frame, and a timeout that is not a death."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, gym.spaces.Dict)
        self.observation_space = gym.spaces.Dict({DOOM_COLUMNS.get(k, k): v for k, v in space.spaces.items()})
        self._last: dict[str, Any] = {}

    def reset(self, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        obs, info = self.env.reset(**kwargs)
        self._last = {DOOM_COLUMNS.get(k, k): v for k, v in obs.items()}
        return self._last, info

    def step(self, action: Any) -> tuple[dict[str, Any], Any, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        game = self.env.unwrapped
        # At the end there is no state, and its zeros would teach a model that dying means black: repeat the last one.
        if game.state is not None:  # type: ignore[attr-defined]
            self._last = {DOOM_COLUMNS.get(k, k): v for k, v in obs.items()}
        if terminated and truncated and not game.game.is_player_dead():  # type: ignore[attr-defined]
            terminated = False  # ViZDoom calls its own timeout both
        return self._last, reward, terminated, truncated, info

    def close(self) -> None:
        super().close()
        home = getattr(self.env.unwrapped, "raywm_home", None)
        if home is not None:
            home.cleanup()
