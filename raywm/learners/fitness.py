"""What a dream worker does: hold one model and some starts, and dream for controllers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raywm.controllers import Controller, PopulationPolicy
from raywm.dream import dream_returns
from raywm.learners.reinforce import Reinforce
from raywm.models import build_model
from raywm.models.base import State, take


class DreamWorker:
    """Evaluates units of controllers in one model's dreams. Plain: `runtime` makes it an actor.

    What it returns is a function of the weights, the unit and the seed alone: units have one shape and the worker a
    fixed number of threads, because another batch shape or thread count may round differently.

    Args:
        spec: "model" (arguments of `build_model`), "controller" (arguments of `Controller`), "codec" (ActionCodec).
        starts: dreams a controller, all candidates from the same starts; horizon: steps of a dream at the most;
        temperature, sampled_ends: see `dream_returns`; precision: fp32 | bf16; threads: 0 leaves torch's.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        *,
        starts: int,
        horizon: int,
        temperature: float = 1.0,
        sampled_ends: bool = True,
        precision: str = "fp32",
        threads: int = 1,
        device: str = "cpu",
    ):
        if threads:
            torch.set_num_threads(threads)
        self.model = build_model(**spec["model"]).to(device).eval()
        self.controller, self.codec = Controller(**spec["controller"]), spec["codec"]
        self.starts, self.horizon, self.temperature = starts, horizon, temperature
        self.sampled_ends, self.precision, self.device = sampled_ends, precision, device
        self.dreamer = self.model.dreamer(precision)
        self.pool: State = {}

    def load(self, weights: dict[str, torch.Tensor], pool: State) -> None:
        """Take a model's weights and the first real observations, as the model encodes them: leaves (N, ...)."""
        self.model.load_state_dict(weights)
        self.dreamer = self.model.dreamer(self.precision)
        self.pool = {k: v.to(self.device) for k, v in pool.items()}

    def _begin(self, seed: int, dreams: int) -> tuple[State, torch.Generator]:
        rng = torch.Generator(self.device).manual_seed(seed)
        count = next(iter(self.pool.values())).shape[0]
        return self._start(torch.randint(count, (dreams,), generator=rng, device=self.device), rng), rng

    @torch.inference_mode()
    def _start(self, index: torch.Tensor, rng: torch.Generator) -> State:
        """Dreams begin where episodes do: at the posterior of a real first observation."""
        rows = len(index)
        nothing = torch.zeros(rows, self.model.act_dim, device=self.device)
        first = torch.ones(rows, dtype=torch.bool, device=self.device)
        noise = self.model.noise(rows, rng)
        return self.model.posterior(self.model.initial(rows), nothing, take(self.pool, index), first, noise)

    def evaluate(self, theta: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean dream returns (P,) of controllers (P, D), and the dream steps each of them lived (P,)."""
        start, rng = self._begin(seed, self.starts)
        policy = PopulationPolicy(self.controller, self.codec, torch.tensor(theta, dtype=torch.float32).to(self.device))
        total, length = self._returns(policy, start, rng, len(theta))
        total, length = total.double().view(len(theta), -1), length.view(len(theta), -1)
        return total.mean(1).cpu().numpy(), length.sum(1).long().cpu().numpy()

    def rate(self, theta: np.ndarray, seed: int, dreams: int = 256) -> tuple[float, int]:
        """One controller's (D,) mean return over many dreams, and the steps it lived."""
        start, rng = self._begin(seed, dreams)
        parameters = torch.tensor(theta[None], dtype=torch.float32).to(self.device)
        total, length = self._returns(PopulationPolicy(self.controller, self.codec, parameters), start, rng, 1)
        return float(total.double().mean()), int(length.sum())

    def _returns(self, policy: Any, start: State, rng: torch.Generator, candidates: int) -> Any:
        return dream_returns(
            self.dreamer,
            policy,
            start,
            self.horizon,
            rng,
            self.temperature,
            candidates=candidates,
            sampled_ends=self.sampled_ends,
        )

    def scripted(self, actions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Dream returns and lengths (E,) of actions (H, E, A) drawn beforehand: a policy that does not look."""
        given = torch.from_numpy(actions).to(self.device)
        rng = torch.Generator(self.device).manual_seed(seed)
        count = next(iter(self.pool.values())).shape[0]
        index = torch.arange(actions.shape[1], device=self.device) % count
        start = self._start(index, rng)
        total, length = self._returns(lambda _, t: given[t], start, rng, 1)
        return total.double().cpu().numpy(), length.double().cpu().numpy()

    def reinforce(self, state: dict[str, np.ndarray], seed: int, **sizes: Any) -> tuple[dict[str, np.ndarray], dict]:
        """One REINFORCE update in the dream; `state` is the learner's, as `Reinforce.state`."""
        start, rng = self._begin(seed, self.starts)
        learner = Reinforce(self.controller, self.codec, **sizes)
        learner.load(state)
        metrics = learner.update(self.dreamer, start, self.horizon, rng, self.temperature)
        return learner.state(), metrics
