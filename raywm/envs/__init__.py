"""Environments: ``make_env`` for any of them, and raywm's own (ids ``raywm/...``), registered on import."""

import gymnasium as gym

from raywm.envs import classic, pixels
from raywm.envs.make import make_env

__all__ = ["classic", "make_env", "pixels"]

if "raywm/Dream-v0" not in gym.registry:  # by name: its module imports torch
    gym.register(
        "raywm/Dream-v0",
        entry_point="raywm.envs.dream_env:DreamEnv",
        vector_entry_point="raywm.envs.dream_env:DreamVectorEnv",
    )
