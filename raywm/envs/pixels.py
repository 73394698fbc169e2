"""Environments seen as 64x64 images, drawn with numpy in microseconds: learning from pixels on a laptop."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv

PIXELS = 64
ZOOM = 4  # of render(), for videos


class PixelEnv(gym.Env):
    """What the environments below share: observations and ``render`` from one ``frame()``, (64, 64, 3) uint8."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012 (gymnasium's name)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0, 255, (PIXELS, PIXELS, 3), np.uint8)

    def frame(self) -> np.ndarray:
        raise NotImplementedError

    def render(self) -> np.ndarray:  # type: ignore[override]
        return self.frame().repeat(ZOOM, 0).repeat(ZOOM, 1)


class CartPolePixelsEnv(PixelEnv):
    """CartPole-v1 that shows a picture instead of its state: the same physics, rewards, ends and seeds.

    One frame tells where cart and pole are, not how fast they move, so an agent needs to remember. Edges are drawn
    with the share of a pixel that they cover, so that a step's small movements are seen. The pole is drawn three
    times its length: to scale its tip would stay within two pixels. A return of 500 is optimal, about 22 is chance.
    """

    STEPS = 500
    GROUND, TOP = 52, 8  # rows: of the track, and above the highest pole
    CART, POLE = (6.0, 6.0), (34.0, 1.5)  # half width and height; length and half width
    SKY, TRACK, BODY, WOOD = (235, 240, 245), (120, 120, 120), (30, 40, 60), (200, 60, 30)

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.game = CartPoleEnv()
        self.action_space = self.game.action_space
        self._scale = (PIXELS / 2 - self.CART[0] - 1) / self.game.x_threshold  # pixels a unit of x
        self._background = np.full((PIXELS, PIXELS, 3), self.SKY, np.uint8)
        self._background[self.GROUND] = self.TRACK
        self._centers = np.arange(PIXELS, dtype=np.float32) + 0.5
        rows = slice(self.TOP, self.GROUND)
        self._rows, self._y = rows, self._centers[rows, None]
        self._toward = np.array(self.WOOD, np.float32) - np.array(self.SKY, np.float32)

    def frame(self) -> np.ndarray:
        assert self.game.state is not None, "reset() comes first"
        x, _, angle, _ = self.game.state
        middle, top = np.float32(PIXELS / 2 + self._scale * x), np.float32(self.GROUND - self.CART[1])
        sin, cos = np.float32(np.sin(angle)), np.float32(np.cos(angle))
        right, down = self._centers - middle, self._y - top
        # of every pixel above the ground: how far along the pole, and how far beside it
        along, beside = right * sin - down * cos, np.abs(right * cos + down * sin)  # (rows, 64)
        length, half = self.POLE
        end = np.clip(np.minimum(along, length - along) + 0.5, 0, 1)
        cover = end * np.clip(half + 0.5 - beside, 0, 1)
        image = self._background.copy()
        image[self._rows] = np.array(self.SKY, np.float32) + cover[..., None] * self._toward
        cart = np.clip(self.CART[0] + 0.5 - np.abs(right), 0, 1)[:, None]  # (64, 1)
        under = image[self.GROUND - int(self.CART[1]) : self.GROUND]  # (6, 64, 3), a view
        under[...] = under + cart * (np.array(self.BODY, np.float32) - under)
        return image

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.game.reset(seed=seed, options=options)
        return self.frame(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        _, reward, terminated, truncated, info = self.game.step(action)
        return self.frame(), float(reward), terminated, truncated, info


class GridEnv(PixelEnv):
    """A grid of `size` x `size` cells with walls and lava, seen from above; every episode's grid is another one.

    Actions: up, right, down, left; a wall and the edge leave the agent where it is. Reward 1 for reaching the goal and
    -1 for stepping into lava, both terminal, 0 otherwise; 50 steps under its registered id. The goal can always be
    reached in time without lava, so the optimal return is 1; ``random_return`` is that of uniformly random actions
    in the grid at hand. Raises ValueError where `size` does not divide 64, or more is put in than fits.
    """

    STEPS = 50
    MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
    FLOOR, WALL, LAVA, GOAL = range(4)
    COLOURS = np.array([(225, 225, 215), (70, 70, 80), (230, 80, 20), (40, 170, 60)], np.uint8)
    AGENT = np.array((40, 70, 220), np.uint8)

    def __init__(self, size: int = 8, walls: int = 10, lava: int = 5, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        if size < 2 or PIXELS % size or PIXELS // size < 4:
            raise ValueError(f"size is {size}, expected 2, 4, 8 or 16 cells a side of {PIXELS} pixels")
        if min(walls, lava) < 0 or walls + lava + 2 > size * size:
            raise ValueError(f"{walls} walls and {lava} lava, expected at most {size * size - 2} together")
        self.size, self.walls, self.lava = size, walls, lava
        self.action_space = gym.spaces.Discrete(len(self.MOVES))
        self.cells, self.next, self.agent = np.zeros(0, int), np.zeros((4, 0), int), 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        while True:  # agent and goal are neighbours often enough, whatever is put between them
            order = self.np_random.permutation(self.size**2)
            self.agent = int(order[0])
            self.cells = np.zeros(self.size**2, int)
            self.cells[order[1]] = self.GOAL
            self.cells[order[2 : 2 + self.walls]] = self.WALL
            self.cells[order[2 + self.walls : 2 + self.walls + self.lava]] = self.LAVA
            self.next = self._moves()
            if self.distances()[self.agent] <= self.STEPS:
                return self.frame(), {}

    def _moves(self) -> np.ndarray:
        """(4, cells): where each action leads from each cell."""
        here = np.arange(self.size**2)
        row, column = np.divmod(here, self.size)
        there = np.stack(
            [
                np.clip(row + down, 0, self.size - 1) * self.size + np.clip(column + right, 0, self.size - 1)
                for down, right in self.MOVES
            ]
        )
        return np.where(self.cells[there] == self.WALL, here, there)

    def distances(self) -> np.ndarray:
        """(cells,): steps from each cell to the goal that avoid lava; inf where there is no way."""
        distance = np.where(self.cells == self.GOAL, 0.0, np.inf)
        floor = self.cells == self.FLOOR
        while True:
            nearer = np.where(floor, np.minimum(distance, 1 + distance[self.next].min(0)), distance)
            if np.array_equal(nearer, distance):
                return distance
            distance = nearer

    def optimal_action(self) -> int:
        """The first step of a shortest way to the goal."""
        return int(self.distances()[self.next[:, self.agent]].argmin())

    def random_return(self, steps: int = STEPS) -> float:
        """The expected return of uniformly random actions from here, with `steps` left."""
        reward = np.select([self.cells == self.GOAL, self.cells == self.LAVA], [1.0, -1.0], 0.0)
        value = np.zeros(self.size**2)
        for _ in range(steps):  # backwards in time
            value = np.where(self.cells == self.FLOOR, (reward + value)[self.next].mean(0), 0)
        return float(value[self.agent])

    def frame(self) -> np.ndarray:
        side = PIXELS // self.size
        image = self.COLOURS[self.cells.reshape(self.size, self.size)].repeat(side, 0).repeat(side, 1)
        row, column = divmod(self.agent, self.size)
        image[row * side + 1 : (row + 1) * side - 1, column * side + 1 : (column + 1) * side - 1] = self.AGENT
        return image

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.agent = int(self.next[int(action), self.agent])
        cell = int(self.cells[self.agent])
        reward = 1.0 if cell == self.GOAL else -1.0 if cell == self.LAVA else 0.0
        return self.frame(), reward, cell in (self.GOAL, self.LAVA), False, {}


if "raywm/Grid-v0" not in gym.registry:
    gym.register(
        "raywm/CartPolePixels-v0",
        entry_point="raywm.envs.pixels:CartPolePixelsEnv",
        max_episode_steps=CartPolePixelsEnv.STEPS,
    )
    gym.register("raywm/Grid-v0", entry_point="raywm.envs.pixels:GridEnv", max_episode_steps=GridEnv.STEPS)
