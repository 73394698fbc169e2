"""The DeepMind Control suite as gymnasium ids ``dm_control/<domain>-<task>-v0``; imported when one is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from ctypes.util import find_library
from typing import Any

import gymnasium as gym
import numpy as np

STEPS = 1000  # of every task of the suite (LQR, which has no limit of its own, too)
SUITE_CAMERA = {"quadruped": 2}  # 0 elsewhere; as in Dreamer's experiments
VIDEO = (240, 240)
NO_RENDERER = (
    "images need an OpenGL renderer that works without a display; install libegl1 (or libosmesa6) and leave MUJOCO_GL "
    "unset, or set it to egl, osmesa or glfw before the start"
)


def _load_suite() -> Any:
    """``dm_control.suite``, whose renderer is chosen when it is first imported, by the variable MUJOCO_GL.

    Unset it would take glfw, which wants a display that clusters do not have. Without any renderer all but images
    works.
    """
    if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
        os.environ["MUJOCO_GL"] = "egl" if find_library("EGL") else "osmesa" if find_library("OSMesa") else "off"
        try:
            from dm_control import suite

            return suite
        except ModuleNotFoundError:
            del os.environ["MUJOCO_GL"]
            raise
        except Exception:  # a library without a driver
            os.environ["MUJOCO_GL"] = "off"
    from dm_control import suite

    return suite


suite = _load_suite()


class DMControl(gym.Env):
    """One task of the suite: the float32 columns of its observation, or, with `pixels`, an image of `size` alone.

    `camera`: number or name; None is the one that Dreamer's experiments use. Raises ValueError for an unknown task,
    and for `pixels` where nothing can draw.
    """

    def __init__(
        self,
        domain: str,
        task: str,
        pixels: bool = False,
        size: tuple[int, int] = (64, 64),
        camera: int | str | None = None,
        render_mode: str | None = None,
    ) -> None:
        # No time limit of its own: the registered one counts. The seed here is for what a task draws once (LQR).
        self.env = suite.load(domain, task, task_kwargs={"random": 0, "time_limit": float("inf")})
        self.pixels, self.size, self.render_mode = pixels, (int(size[0]), int(size[1])), render_mode
        self.camera = SUITE_CAMERA.get(domain, 0) if camera is None else camera
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / self.env.control_timestep())}
        limits = self.env.action_spec()
        low, high = (np.broadcast_to(bound, limits.shape) for bound in (limits.minimum, limits.maximum))
        self.action_space = gym.spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        self.observation_space: gym.Space
        if pixels:
            self.observation_space = gym.spaces.Box(0, 255, (*self.size, 3), np.uint8)
            self.env.reset()
            try:
                self._draw(self.size)
            except Exception as error:
                raise ValueError(f"{type(error).__name__}: {error}; {NO_RENDERER}") from error
        else:
            spec = {name: s for name, s in self.env.observation_spec().items() if int(np.prod(s.shape)) > 0}
            boxes: dict[str, gym.Space] = {
                name: gym.spaces.Box(-np.inf, np.inf, s.shape, np.float32) for name, s in spec.items()
            }
            self.observation_space = gym.spaces.Dict(boxes)

    def _draw(self, size: tuple[int, int]) -> np.ndarray:
        return np.ascontiguousarray(self.env.physics.render(*size, camera_id=self.camera))

    def _observe(self, observation: Mapping[str, Any]) -> Any:
        if self.pixels:
            return self._draw(self.size)
        spaces: Any = self.observation_space
        return {name: np.asarray(observation[name], np.float32) for name in spaces.spaces}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.env.task.random.seed(int(self.np_random.integers(2**32)))
        return self._observe(self.env.reset().observation), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        moment = self.env.step(np.asarray(action, np.float64))
        ended = moment.last()  # never by time
        terminal = ended and moment.discount == 0
        return self._observe(moment.observation), float(moment.reward), terminal, ended and not terminal, {}

    def render(self) -> np.ndarray:  # type: ignore[override]
        return self._draw(VIDEO)

    def close(self) -> None:
        self.env.close()


for _domain, _task in suite.ALL_TASKS:
    _id = f"dm_control/{_domain}-{_task}-v0"
    gym.registry.pop(_id, None)  # of another package's, which would not know `pixels`
    gym.register(
        _id,
        entry_point="raywm.envs.dmc:DMControl",
        kwargs={"domain": _domain, "task": _task},
        max_episode_steps=STEPS,
    )
