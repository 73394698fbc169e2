"""Environments: ``make_env`` for any of them, and raywm's own (ids ``raywm/...``), registered on import."""

from raywm.envs import classic, pixels
from raywm.envs.make import make_env

__all__ = ["classic", "make_env", "pixels"]
