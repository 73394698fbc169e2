"""An agent's step as one pure function: (obs, state, is_first, noise) -> (action, state).

Everything has the batch first, is a tensor or a dict of tensors, and nothing is remembered in between:

    obs        the observation columns as they are stored: images (B, H, W, C) uint8, vectors (B, D) float32
    state      what the last call returned, zeros before the first; its leaf "action" is the encoded action that led
               here, so whoever takes another one than he was told to puts that there
    is_first   (B,) bool: rows whose episode begins with this observation, whatever their state is
    noise      all the randomness of the step
    action     as the environment takes it: (B, *shape) of the action space's dtype
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raywm.controllers import ControllerAgent
from raywm.learners.dreamer_agent import DreamerAgent
from raywm.models.base import State
from raywm.models.rssm import RSSM
from raywm.models.vm import VM
from raywm.spaces import ActionCodec

Tensors = dict[str, Tensor]

# Parts of models that only dream, decode or judge.
UNUSED = ("decoder", "reward", "cont", "prior", "prior_out", "memory.mixture", "memory.reward", "memory.end")
UNUSED_OF_VISION = ("decoder", "from_latent", "deconvs")
TORCH_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}


class Field(NamedTuple):
    """An input or output: its name in the file, shape of a row, dtype, and what to give for it."""

    name: str  # obs.*, state.*, noise.*, is_first; outputs: action, next.* (what state.* is at the next call)
    shape: tuple[int, ...]  # without the batch
    dtype: str
    fill: str = ""  # of inputs: observation, state, flag; of noise: zeros, uniform or normal


class TorchCodec(nn.Module):
    """``ActionCodec.encode`` and ``decode`` in torch, to the same bits."""

    low: Tensor
    high: Tensor
    starts: Tensor

    def __init__(self, codec: ActionCodec):
        super().__init__()
        self.kind, self.groups, self.shape, self.dim = codec.kind, list(codec.groups), codec.shape, codec.dim
        if codec.dtype.name not in TORCH_DTYPES:
            raise ValueError(f"actions are {codec.dtype}, expected one of {', '.join(TORCH_DTYPES)} to export them")
        self.dtype = TORCH_DTYPES[codec.dtype.name]
        if self.kind == "box":  # in float64, as the codec: a bound may not be rounded outwards
            self.register_buffer("low", torch.from_numpy(codec.low.copy()))
            self.register_buffer("high", torch.from_numpy(codec.high.copy()))
        elif self.groups:
            self.register_buffer("starts", torch.from_numpy(codec.starts.copy()))

    def decode(self, vector: Tensor) -> Tensor:
        """(B, A) -> (B, *shape)"""
        if self.kind == "box":
            unit = vector.double().clamp(-1, 1).unflatten(-1, self.shape)
            action = self.low + (unit + 1) / 2 * (self.high - self.low)
            if not self.dtype.is_floating_point:
                action = action.round()
            action = action.to(self.dtype).double()  # ONNX Runtime has no minimum of all dtypes
            return torch.minimum(torch.maximum(action, self.low), self.high).to(self.dtype)
        if self.kind == "multi_binary":
            return (vector > 0.5).unflatten(-1, self.shape).to(self.dtype)
        choice = torch.stack([part.argmax(-1) for part in vector.split(self.groups, -1)], -1) + self.starts
        return choice.reshape(-1, *self.shape).to(self.dtype)

    def encode(self, action: Tensor) -> Tensor:
        """(B, *shape) -> (B, A) float32"""
        flat = action.reshape(-1, len(self.groups) or self.dim)
        if self.kind == "box":
            low, span = self.low.flatten(), (self.high - self.low).flatten()
            unit = 2 * (flat.double() - low) / torch.where(span > 0, span, 1.0) - 1
            return torch.where(span > 0, unit.clamp(-1, 1), 0.0).float()
        if self.kind == "multi_binary":
            return (flat != 0).float()
        parts = [nn.functional.one_hot(flat[:, g].long() - self.starts[g], n) for g, n in enumerate(self.groups)]
        return torch.cat(parts, -1).float()


class AgentStep(nn.Module):
    """What all agents' steps have in common: the fields, for a batch of any size."""

    def __init__(self, agent: ControllerAgent | DreamerAgent):
        super().__init__()
        self.model = _without(agent.model)
        self.codec = TorchCodec(agent.codec)

    def _fields(self, agent: Any, columns: dict[str, Any], noise: dict[str, tuple[tuple[int, ...], str]]) -> None:
        state: State = agent.initial(1)
        self.state_names = sorted(state)
        leaves = [Field(f"state.{k}", tuple(state[k].shape[1:]), "float32", "state") for k in self.state_names]
        obs = [Field(f"obs.{k}", tuple(b.shape), str(b.dtype), "observation") for k, b in sorted(columns.items())]
        drawn = [Field(f"noise.{k}", shape, "float32", fill) for k, (shape, fill) in sorted(noise.items())]
        self.inputs = [*obs, *leaves, Field("is_first", (), "bool", "flag"), *drawn]
        action = Field("action", tuple(agent.codec.shape), agent.codec.dtype.name)
        self.outputs = [action, *(f._replace(name=f.name.replace("state.", "next."), fill="") for f in leaves)]

    def example(self, batch: int) -> tuple[Tensors, Tensors, Tensor, Tensors]:
        """Arguments of ``forward``, all zero."""
        zeros = {f.name: torch.zeros(batch, *f.shape, dtype=getattr(torch, f.dtype)) for f in self.inputs}
        return grouped(zeros)

    def _ordered(self, action: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        return action, {k: state[k] for k in self.state_names}


class ControllerStep(AgentStep):
    """V, M and C: ``ControllerAgent.step``."""

    def __init__(self, agent: ControllerAgent, columns: dict[str, Any]):
        super().__init__(agent)
        self.controller, self.squash = agent.controller, agent.codec.squash
        self.layers = nn.ParameterList(agent.controller.layers(torch.tensor(agent.theta).unsqueeze(0)))
        self._fields(agent, columns, {"z": ((agent.model.latent,), "zeros")})  # type: ignore[dict-item]

    def forward(self, obs: Tensors, state: Tensors, is_first: Tensor, noise: Tensors) -> tuple[Tensor, Tensors]:
        now = self.model.posterior(state, state["action"], obs, is_first, noise)
        scores = self.controller.forward(list(self.layers), self.model.features(now).unsqueeze(0)).squeeze(0)
        action = self.squash(scores)
        return self._ordered(self.codec.decode(action), now | {"action": action})


class DreamerStep(AgentStep):
    """Encoder, dynamics and the greedy actor: ``DreamerAgent.step``."""

    def __init__(self, agent: DreamerAgent, columns: dict[str, Any]):
        super().__init__(agent)
        self.actor = agent.actor
        latent: Any = agent.model.latent
        fill = "uniform" if latent.uniform else "normal"
        self._fields(agent, columns, {"stoch": ((latent.noise_dim,), fill)})

    def forward(self, obs: Tensors, state: Tensors, is_first: Tensor, noise: Tensors) -> tuple[Tensor, Tensors]:
        now = self.model.posterior(state, state["action"], obs, is_first, noise)
        taken = self.codec.decode(self.actor.sample(self.model.features(now), None))
        return self._ordered(taken, now | {"action": self.codec.encode(taken)})


def step_of(agent: Any, columns: dict[str, Any]) -> ControllerStep | DreamerStep:
    """The step of a run's agent (``open_run(run).agent()``) for its observation columns. Raises ValueError for an agent
    with a world model of the user's own."""
    if not isinstance(agent.model, (VM, RSSM)):
        raise ValueError(
            f"got a run of the model {type(agent.model).__name__}, expected raywm's VM or RSSM to export it"
        )
    kind = ControllerStep if isinstance(agent, ControllerAgent) else DreamerStep
    step: Any = kind(agent, columns)
    return step.eval().requires_grad_(False)


def grouped(flat: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any, dict[str, Any]]:
    """Values by ``Field.name`` -> (obs, state, is_first, noise)."""
    parts: dict[str, dict[str, Any]] = {"obs": {}, "state": {}, "noise": {}}
    for name, value in flat.items():
        group, dot, key = name.partition(".")
        if dot:
            parts[group][key] = value
    return parts["obs"], parts["state"], flat["is_first"], parts["noise"]


def _without(model: Any) -> Any:
    """A copy of a model without the parts that acting does not need, which would be most of the file."""
    model = copy.deepcopy(model)
    nets = getattr(getattr(model, "vision", None), "nets", {})
    for path in [*UNUSED, *(f"vision.nets.{name}.{part}" for name in nets for part in UNUSED_OF_VISION)]:
        owner, _, part = path.rpartition(".")
        try:
            delattr(model.get_submodule(owner), part)
        except AttributeError:
            continue  # another kind of model
    return model
