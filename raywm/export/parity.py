"""Whether an export does what the agent does: both fed the same observations, states and noise, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from raywm.envs import make_env
from raywm.export.formats import Arrays, Call
from raywm.export.step import AgentStep
from raywm.seeding import derive, rng

TOLERANCE = 1e-4
ENVS = 4
EDGES = 1e-3  # share of comparisons whose draw may lie on the edge between two classes


class Parity:
    """Compares `call` with `agent` over real steps of an environment.

    Attributes: figure (largest absolute difference of any number of state or action; Box actions in [-1, 1]), steps,
    comparisons (rows), edges.
    """

    def __init__(self, step: AgentStep, agent: Any, call: Call, seed: int):
        self.step, self.agent, self.call = step, agent, call
        self.noise_of = torch.Generator().manual_seed(derive(seed, "parity", "noise"))
        self.seed, self.steps, self.comparisons, self.edges, self.figure = seed, 0, 0, 0, 0.0

    def play(self, env: Any, steps: int, progress: Callable[[int], Any] = lambda n: None) -> dict[str, Any]:
        """Play `steps` real steps of the agent's and compare every one, under the agent's noise and under other.

        Returns what the card says of it. Raises ValueError for a difference above `TOLERANCE` or another action.
        """
        envs = [make_env(env) for _ in range(min(ENVS, steps))]
        try:
            self._play(envs, steps, progress)
        finally:
            for made in envs:
                made.close()
        if self.edges > max(1.0, EDGES * self.comparisons):
            raise ValueError(
                f"the export draws other classes than the agent in {self.edges} of {self.comparisons} rows"
            )
        about = {"max_abs_difference": self.figure, "tolerance": TOLERANCE, "steps": self.steps}
        return about | {"comparisons": self.comparisons, "draws_on_an_edge": self.edges, "seed": self.seed}

    def _play(self, envs: list[Any], steps: int, progress: Callable[[int], Any]) -> None:
        rows, number = len(envs), 0
        rngs = [rng(self.seed, "parity", row) for row in range(rows)]
        state, first = self.agent.initial(rows), np.ones(rows, bool)
        seen: list[Any] = [None] * rows
        while self.steps < steps:
            for row in first.nonzero()[0].tolist():
                seen[row], _ = envs[row].reset(seed=derive(self.seed, "parity", "env", number) % 2**31)
                number += 1
            obs = {k: np.stack([s[k] for s in seen]) for k in seen[0]}
            action, after = self._compare(obs, state, first, self.agent.noise(rngs))
            self._compare(obs, state, first, self.agent.model.noise(rows, self.noise_of))
            first, state = np.zeros(rows, bool), after
            for row, made in enumerate(envs):
                seen[row], _, terminated, truncated, _ = made.step(action[row])
                first[row] = terminated or truncated
            self.steps += rows
            progress(rows)

    def _compare(self, obs: Arrays, state: Any, first: np.ndarray, noise: Any) -> tuple[np.ndarray, Any]:
        """The agent's action and state, held against the export's."""
        action, after = self.agent.step(obs, state, first, noise)
        off = self._difference(obs, state, first, noise, action, after)
        self.comparisons += len(first)
        wrong = off.max(0) > TOLERANCE  # (rows,)
        if wrong.any() and any(f.fill == "uniform" for f in self.step.inputs):
            # A number nearer to the edge between two classes than floats round may fall on either side: draw another.
            again = {k: torch.rand(v.shape, generator=self.noise_of) for k, v in noise.items()}
            off[:, wrong] = self._difference(obs, state, first, again, *self.agent.step(obs, state, first, again))[
                :, wrong
            ]
            self.edges += int(wrong.sum())
        figure = float(off.max())
        self.figure = max(self.figure, figure)
        if not figure <= TOLERANCE:  # nan as well
            name = self.step.outputs[int(off.max(1).argmax())].name
            what = "another action" if name == "action" else f"{name}, by {figure:.3g},"
            raise ValueError(
                f"the export differs from the agent in {what} after {self.steps} steps (tolerance {TOLERANCE:g}); "
                "nothing was written. Another torch or onnxruntime version may do better; if not, report it"
            )
        return action, after

    def _difference(
        self, obs: Arrays, state: Any, first: np.ndarray, noise: Any, action: np.ndarray, after: Any
    ) -> np.ndarray:
        """(outputs, rows): the largest difference of each output in each row."""
        inputs = {f"obs.{k}": v for k, v in obs.items()} | {f"state.{k}": v.numpy() for k, v in state.items()}
        inputs |= {f"noise.{k}": v.numpy() for k, v in noise.items()} | {"is_first": first}
        rows, cut = len(first), self.steps // len(first) % len(first)  # in two batches, whose sizes take turns
        parts = [
            self.call({f.name: np.ascontiguousarray(inputs[f.name][part]) for f in self.step.inputs})
            for part in (slice(0, cut), slice(cut, rows))
            if part.stop > part.start
        ]
        got = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        encode, own = self.agent.codec.encode, {f"next.{k}": v.numpy() for k, v in after.items()}
        off = []
        for name, _, dtype, _ in self.step.outputs:
            mine, its = (action, got[name]) if name == "action" else (own[name], got[name])
            if its.dtype != np.dtype(dtype) or its.shape != mine.shape:
                raise ValueError(f"the export's {name} is {its.dtype} {its.shape}, expected {dtype} {mine.shape}")
            mine, its = (encode(mine), encode(its)) if name == "action" else (mine, its)
            off.append(np.abs(mine.astype(np.float64) - its).reshape(rows, -1).max(1))
        return np.nan_to_num(np.stack(off), nan=np.inf)
