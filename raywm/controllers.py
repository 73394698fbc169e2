"""Controllers: small functions from features to actions with flat parameter vectors, batched over a population."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raywm.agent import Agent
from raywm.models.base import Noise, State, WorldModel
from raywm.spaces import ActionCodec


class Controller:
    """A linear map, or an MLP with one tanh layer, from features (F,) to the scores of an encoded action (A,).

    The paper's C is linear: a = W [z, h] + b. A score becomes an action by `ActionCodec.squash`: tanh into the bounds
    of a Box, argmax in each group of a Discrete or MultiDiscrete space, the sign for MultiBinary.
    """

    def __init__(self, feat_dim: int, act_dim: int, kind: str = "linear", hidden: int = 16):
        if kind not in ("linear", "mlp"):
            raise ValueError(f"got controller.kind={kind!r}, expected linear or mlp")
        self.feat_dim, self.act_dim, self.kind, self.hidden = feat_dim, act_dim, kind, hidden
        sizes = [feat_dim, act_dim] if kind == "linear" else [feat_dim, hidden, act_dim]
        self.shapes = [s for a, b in zip(sizes[:-1], sizes[1:], strict=True) for s in ((a, b), (1, b))]
        self.size = sum(a * b for a, b in self.shapes)

    def start(self) -> np.ndarray:
        """The search's first mean: zeros for a linear map, small random first weights for an MLP (zeros there would
        leave its gradient and its symmetry stuck)."""
        theta = np.zeros(self.size)
        if self.kind == "mlp":
            fan = self.feat_dim
            theta[: fan * self.hidden] = np.random.default_rng(0).normal(size=fan * self.hidden) / np.sqrt(fan)
        return theta

    def layers(self, theta: Tensor) -> list[Tensor]:
        """(P, D) flat parameters -> weights (P, b, a) and biases (P, b, 1) in turn."""
        parts = theta.split([a * b for a, b in self.shapes], 1)
        return [p.unflatten(1, s).transpose(1, 2).contiguous() for p, s in zip(parts, self.shapes, strict=True)]

    def forward(self, layers: Sequence[Tensor], features: Tensor) -> Tensor:
        """Layers of P controllers and (P, E, F) features -> (P, E, A) unbounded scores.

        Products are (b, a) @ (a, E): with few actions that is three times as fast as (E, a) @ (a, b)."""
        out = torch.bmm(layers[0], features.transpose(1, 2)) + layers[1]
        for weight, bias in zip(layers[2::2], layers[3::2], strict=True):
            out = torch.bmm(weight, torch.tanh(out)) + bias
        return out.transpose(1, 2)

    def scores(self, theta: Tensor, features: Tensor) -> Tensor:
        """(P, D) parameters and (P, E, F) features -> (P, E, A) unbounded scores."""
        return self.forward(self.layers(theta), features)


class PopulationPolicy:
    """P controllers (P, D) as one policy over P x E rows, candidate-major."""

    def __init__(self, controller: Controller, codec: ActionCodec, theta: Tensor):
        self.controller, self.codec = controller, codec
        self.layers = controller.layers(theta)  # once, not every step

    def scores(self, features: Tensor) -> Tensor:
        per = features.unflatten(0, (len(self.layers[0]), -1))  # (P*E, F) -> (P, E, F)
        return self.controller.forward(self.layers, per).flatten(0, 1)

    def __call__(self, features: Tensor, t: int) -> Tensor:
        return self.codec.squash(self.scores(features))


def followed(model: WorldModel, state: State, obs: dict[str, np.ndarray], is_first: np.ndarray, noise: Noise) -> State:
    """The posterior after what came (leaves (B, *)). `state`: of an agent, the model's and the last "action" (B, A)."""
    before = {k: v for k, v in state.items() if k != "action"}
    columns = {k: torch.from_numpy(np.require(v, requirements=("C", "W"))) for k, v in obs.items()}
    return model.posterior(before, state["action"], columns, torch.from_numpy(is_first), noise)


class ControllerAgent(Agent):
    """V, M and C acting in an environment: the posterior follows the observations, C reads its features.

    Acts without randomness: z is the posterior's mean. Its state carries the model's and the last action.
    """

    def __init__(
        self,
        model: WorldModel,
        controller: Controller,
        codec: ActionCodec,
        theta: np.ndarray,
        name: str = "controller",
        version: int = 0,
    ):
        self.model, self.controller, self.codec = model.eval(), controller, codec
        self.name, self.version = name, version
        self.theta = theta

    @property
    def theta(self) -> np.ndarray:
        return self._theta.squeeze(0).numpy()

    @theta.setter
    def theta(self, value: np.ndarray) -> None:
        if np.shape(value) != (self.controller.size,):
            raise ValueError(f"got controller parameters {np.shape(value)}, expected ({self.controller.size},)")
        self._theta = torch.tensor(np.asarray(value), dtype=torch.float32).unsqueeze(0)

    def initial(self, batch: int) -> State:
        return self.model.initial(batch) | {"action": torch.zeros(batch, self.codec.dim)}

    def act(
        self, obs: dict[str, np.ndarray], state: State, is_first: np.ndarray, rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, State]:
        """Observations (B, *), the state, which rows begin (B,) -> environment actions (B, *shape) and the state."""
        return self.step(obs, state, is_first, self.noise(rngs))

    def noise(self, rngs: Sequence[np.random.Generator]) -> Noise:
        """What ``act`` gives ``step`` for one generator a row: nothing random, z is the posterior's mean."""
        return self.model.zero_noise(len(rngs))

    @torch.inference_mode()
    def step(
        self, obs: dict[str, np.ndarray], state: State, is_first: np.ndarray, noise: Noise
    ) -> tuple[np.ndarray, State]:
        """``act`` with its randomness given."""
        posterior = followed(self.model, state, obs, is_first, noise)
        scores = self.controller.scores(self._theta, self.model.features(posterior).unsqueeze(0)).squeeze(0)
        action = self.codec.squash(scores)
        return self.codec.decode(action.numpy()), posterior | {"action": action}
