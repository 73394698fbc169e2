"""RLlib both ways: its algorithms learn in a run's dream, and what they learned acts in the real environment.

>>> from raywm.rllib import register
>>> register()
>>> config = PPOConfig().environment("raywm-dream", env_config={"run": "runs/cartpole-seed0"})
>>> config.env_runners(gym_env_vectorize_mode="vector_entry_point", num_envs_per_env_runner=64)

and back: ``raywm.load_agent("rllib:CHECKPOINT")``, ``raywm evaluate rllib:CHECKPOINT``,
``raywm collect ENV --policy rllib:CHECKPOINT``.

RLlib's checkpoints are pickles. They are read as data (``raywm.pickled``): of the code that they name, only RLlib's own
modules and catalogs are ever used, so the file itself runs nothing. The environment that it names is made, as that of a
config is (docs/safety.md).
"""

from __future__ import annotations

import importlib
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from raywm.agent import Agent, LiveAgent
from raywm.controllers import followed
from raywm.envs import make_env
from raywm.envs.dream_env import DreamEnv, DreamVectorEnv
from raywm.models.base import WorldModel
from raywm.pickled import Named, plain, read_pickle
from raywm.spaces import ActionCodec, obs_columns

DREAM, REAL = "raywm-dream", "raywm-env"
PREFIX = "rllib:"  # of what stands where a run's directory may stand
SEED = 0  # of the real episodes of an agent that no run belongs to

# RLlib's own, in the modules where its algorithms keep them.
MODULES = re.compile(r"(ray\.rllib\.algorithms\.\w+\.torch\.default_\w+_torch_rl_module)\.(Default\w+TorchRLModule)")
CATALOGS = re.compile(r"(ray\.rllib\.(?:algorithms\.\w+\.\w+_catalog|core\.models\.catalog))\.(\w*Catalog)")
POLICY = "learner_group/learner/rl_module/default_policy"


# ------------------------------------------------------------------------------------------------ into the dream


def register() -> None:
    """Make two environments known to RLlib, on all nodes of the Ray that is, or will be, connected to.

    - ``raywm-dream``: env_config are the arguments of ``DreamVectorEnv``, above all "run", a directory that every
      EnvRunner can read. With ``gym_env_vectorize_mode="vector_entry_point"`` the dreams of an EnvRunner are one batch.
    - ``raywm-env``: the real environment as runs see it; env_config are the keys of ``make_env``.
    """
    from ray.tune.registry import register_env

    register_env(DREAM, dream_env)
    register_env(REAL, real_env)


def dream_env(config: Mapping[str, Any]) -> DreamEnv | DreamVectorEnv:
    """RLlib's creator: all of an EnvRunner's dreams where it says their number, else one."""
    return DreamVectorEnv(**config) if "num_envs" in config else DreamEnv(**config)


def real_env(config: Mapping[str, Any]) -> gym.Env:
    """The environment of an EnvConfig's keys, with its one observation column as a plain Box.

    Raises ValueError for an environment with several columns: RLlib's default networks take one Box."""
    return OneColumn(make_env(dict(config)))


class OneColumn(gym.ObservationWrapper):
    """The only column of a ``make_env`` environment."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        columns: Any = env.observation_space
        self.name = _only_column(columns.spaces)
        self.observation_space = columns[self.name]

    def observation(self, observation: Any) -> np.ndarray:
        return observation[self.name]


def _only_column(columns: Mapping[str, Any]) -> str:
    if len(columns) != 1:
        raise ValueError(
            f"got observation columns {sorted(columns)}, expected one: RLlib's default networks take one Box"
        )
    return next(iter(columns))


# ------------------------------------------------------------------------------------------------ and back


class SavedPolicy:
    """An RLlib algorithm's checkpoint (``Algorithm.save_to_path``, or one of Tune's), as an agent.

    A policy that was trained in a run's dream on its features acts through the model of that run; one that was
    trained on observations, dreamt ("decoded") or real, acts on the real ones.

    Attributes: env (of ``make_env``), columns, codec, seed: of the real environment; model: the WorldModel it acts
        through, or None.
    Raises ValueError for what is no such checkpoint, and for parts in it that are the user's own (networks,
    connectors): use ``RLlibAgent`` with a module that you loaded yourself.
    """

    def __init__(self, checkpoint: str | Path):
        self.path = Path(checkpoint)
        if not (self.path / POLICY / "module_state.pkl").is_file():
            raise ValueError(
                f"{self.path} holds no {POLICY}/module_state.pkl, expected an RLlib algorithm's checkpoint with one "
                "policy, of the new API stack, as algorithm.save_to_path(...) writes it"
            )
        made: Any = read_pickle(self.path / "class_and_ctor_args.pkl")
        self.config = _settings(made)
        self.spec = self._spec()
        self.model: WorldModel | None = None
        self._environment()
        expected = (self.model.feat_dim,) if self.model is not None else self.columns[_only_column(self.columns)].shape
        observed = self.spec["observation_space"].shape
        if observed != expected or self.spec["action_space"] != self.codec.space:
            raise ValueError(
                f"{self.path} maps observations {observed} to {self.spec['action_space']}, but its environment gives "
                f"{expected} and takes {self.codec.space}; was the run trained anew, with other sizes?"
            )

    def _environment(self) -> None:
        name, settings = self.config.get("env"), self.config["env_config"]
        if name in (DREAM, "raywm/Dream-v0", "raywm.envs:raywm/Dream-v0"):
            from raywm.loops.saved import open_run

            where = settings.get("run")
            if not isinstance(where, (str, Path)):
                raise ValueError(f"{self.path} was trained in the dream of {where!r}, expected a run's directory")
            try:
                run = open_run(where)
            except ValueError as error:
                raise ValueError(f"{self.path} was trained in the dream of {where}: {error}") from error
            self.env: Any = run.config.env
            self.columns, self.codec, self.seed = run.columns, run.codec, run.config.seed
            if settings.get("observe", "features") == "features":
                self.model = run.world_model()
            return
        if not isinstance(name, str):
            raise ValueError(f"{self.path} was trained in {name!r}, expected {DREAM}, {REAL} or a gymnasium id")
        self.env = settings if name == REAL else {"id": name, "kwargs": settings}
        env = make_env(self.env)
        try:
            self.columns, self.codec = obs_columns(env.observation_space), ActionCodec(env.action_space)
        finally:
            env.close()
        self.seed = SEED

    def _spec(self) -> dict[str, Any]:
        """Arguments of RLModuleSpec, with RLlib's own classes by their names."""
        made: Any = read_pickle(self.path / POLICY / "class_and_ctor_args.pkl")
        try:
            cls, (_, found) = made["class"], made["ctor_args_and_kwargs"]
            spec = {
                "module_class": _named(cls, MODULES, "RLModule"),
                "catalog_class": found["catalog_class"] and _named(found["catalog_class"], CATALOGS, "catalog"),
                "observation_space": found["observation_space"],
                "action_space": found["action_space"],
                "model_config": found["model_config"],
            }
            for name in ("observation_space", "action_space"):
                if not isinstance(spec[name], gym.Space):
                    raise ValueError(f"its {name} is {spec[name]}, expected a Box, Discrete or MultiDiscrete")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: {error}; load it yourself and give its module to RLlibAgent") from error
        if (own := _own(spec["model_config"])) is not None:
            raise ValueError(f"{self.path}: its model_config holds {own}, expected plain values")
        return spec

    def agent(self) -> RLlibAgent:
        """The greedy agent."""
        weights: Any = read_pickle(self.path / POLICY / "module_state.pkl")
        if not isinstance(weights, dict) or not all(isinstance(value, np.ndarray) for value in weights.values()):
            raise ValueError(f"{self.path / POLICY / 'module_state.pkl'} holds other things than arrays by name")
        squashed = bool(self.config.get("normalize_actions", True))
        agent = RLlibAgent(rl_module(self.spec, weights), self.codec, self.model, squashed=squashed)
        agent.version = zlib.crc32(b"".join(weights[name].tobytes() for name in sorted(weights)))
        return agent

    def live(self) -> LiveAgent:
        return LiveAgent(self.agent(), self.codec, self.columns, self.seed)


class RLlibAgent(Agent):
    """An RLModule's most likely actions, as an agent. ``version``: a checksum of its weights, of a ``SavedPolicy``.

    Args:
        module: a TorchRLModule without recurrent state, e.g. ``algorithm.get_module()``.
        codec: of the real environment's actions.
        model: the world model whose features the module takes; None: it takes the one observation column.
        squashed: whether the module gives Box actions in [-1, 1] (RLlib's ``normalize_actions``, its default) rather
            than as they are, to be clipped.

    Through a model it acts on samples of the posterior, as in the dream, drawn from each row's own generator.
    Raises ValueError for a module with recurrent state.
    """

    name = "rllib"

    def __init__(self, module: Any, codec: ActionCodec, model: WorldModel | None = None, squashed: bool = True):
        if module.is_stateful():
            raise ValueError(
                "the module has recurrent state (use_lstm), expected one without; a world model has memory"
            )
        self.module, self.codec, self.squashed = module.eval().requires_grad_(False), codec, squashed
        self.model = None if model is None else model.eval()

    def initial(self, B: int) -> Any:
        if self.model is None:
            return None
        return self.model.initial(B) | {"action": torch.zeros(B, self.codec.dim)}

    @torch.inference_mode()
    def act(
        self, obs: dict[str, np.ndarray], state: Any, is_first: np.ndarray, rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, Any]:
        if self.model is None:
            return self._act(torch.from_numpy(np.array(obs[_only_column(obs)]))), None
        now = followed(self.model, state, obs, is_first, self._noise(rngs))
        action = self._act(self.model.features(now))
        return action, now | {"action": torch.from_numpy(self.codec.encode(action))}

    def _noise(self, rngs: Sequence[np.random.Generator]) -> dict[str, torch.Tensor]:
        assert self.model is not None
        generator = torch.Generator()
        parts = [self.model.noise(1, generator.manual_seed(int(rng.integers(2**63)))) for rng in rngs]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _act(self, observed: torch.Tensor) -> np.ndarray:
        """Observations (B, *) -> environment actions (B, *shape)."""
        from ray.rllib.core.columns import Columns

        out = self.module.forward_inference({Columns.OBS: observed})
        if Columns.ACTIONS in out:
            taken = out[Columns.ACTIONS]
        else:
            likely = self.module.get_inference_action_dist_cls().from_logits(out[Columns.ACTION_DIST_INPUTS])
            taken = likely.to_deterministic().sample()
        action = taken.numpy().reshape(len(observed), *self.codec.shape)
        if self.codec.kind != "box":
            return action.astype(self.codec.dtype)
        if self.squashed:
            return self.codec.decode(action.reshape(len(action), self.codec.dim))
        return np.clip(action, self.codec.space.low, self.codec.space.high).astype(self.codec.dtype)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        module = self.module
        spec = {
            "module_class": type(module),
            "catalog_class": type(module.catalog) if module.catalog is not None else None,
            "observation_space": module.observation_space,
            "action_space": module.action_space,
            "model_config": module.model_config,
        }
        weights = {name: value.numpy() for name, value in module.state_dict().items()}
        return _rebuilt, (self.version, spec, weights, self.codec, self.model, self.squashed)


def _rebuilt(version: int, spec: dict[str, Any], weights: dict[str, np.ndarray], *rest: Any) -> RLlibAgent:
    agent = RLlibAgent(rl_module(spec, weights), *rest)
    agent.version = version
    return agent


def rl_module(spec: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Any:
    """An RLModule with given weights. `spec`: arguments of RLModuleSpec. Raises ValueError where they do not fit."""
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec

    module: Any = RLModuleSpec(**spec).build()
    try:
        module.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    except RuntimeError as error:
        said = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"weights do not fit this {type(module).__name__}: {said}; use the Ray that saved it"
        ) from None
    return module


def _settings(made: Any) -> dict[str, Any]:
    """The algorithm's config from its constructor's arguments."""
    try:
        config = made["ctor_args_and_kwargs"][0][0]
        given = config["env_config"]  # an EnvContext, which is a dict
        config["env_config"] = plain(given.items) if isinstance(given, Named) else dict(given or {})
    except (KeyError, IndexError, TypeError, ValueError, RecursionError):
        raise ValueError("the checkpoint's class_and_ctor_args.pkl holds no AlgorithmConfig; see ray.rllib") from None
    for key in ("_env_to_module_connector", "_module_to_env_connector"):
        if config.get(key) is not None:
            raise ValueError(
                f"the algorithm had connectors of its own ({key.strip('_')}), which cannot be read safely; wrap the "
                "environment instead, or give the module to RLlibAgent"
            )
    return config


def _named(value: Any, pattern: re.Pattern[str], what: str) -> Any:
    """RLlib's own class of that name. Raises ValueError for any other, before anything is imported."""
    name = value.name if isinstance(value, type) and issubclass(value, Named) else repr(value)
    match = pattern.fullmatch(name)
    if match is None:
        raise ValueError(f"its {what} is {name}, expected one of RLlib's own")
    return getattr(importlib.import_module(match.group(1)), match.group(2))


def _own(value: Any) -> Any:
    """What a plain config value holds that is not plain, or None."""
    if isinstance(value, dict):
        return next((found for one in value.values() if (found := _own(one)) is not None), None)
    if isinstance(value, (list, tuple)):
        return next((found for one in value if (found := _own(one)) is not None), None)
    return value if isinstance(value, Named) or (isinstance(value, type) and issubclass(value, Named)) else None
