"""The one world-model interface: what every model promises and every learner relies on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from raywm.data.batch import Batch

State = dict[str, Tensor]  # every leaf (B, ...): indexing, repeating and concatenating on dim 0 are always legal
Noise = dict[str, Tensor]  # likewise


class Step(NamedTuple):
    """What `imagine` returns: the arrival state, the reward received on arriving, the probability of going on."""

    state: State
    reward: Tensor  # (B,)
    cont: Tensor  # (B,) probability in [0, 1]


class Fit(NamedTuple):
    """What `loss` returns: a loss for each sequence and the states it went through."""

    loss: Tensor  # (B,)
    metrics: dict[str, Tensor]
    states: State  # leaves (B*T, ...), batch-major
    valid: Tensor  # (B*T,) rows that may start a dream: neither padding nor terminal


class Dreamer(Protocol):
    """What a dream needs of a model: `WorldModel` has it, and so has what `WorldModel.dreamer` returns."""

    def noise(self, batch: int, rng: torch.Generator) -> Noise: ...

    def imagine(self, state: State, action: Tensor, noise: Noise, temperature: float = 1.0) -> Step: ...

    def features(self, state: State) -> Tensor: ...

    def advance(
        self, state: State, action: Tensor, noise: Noise, temperature: float = 1.0
    ) -> tuple[State, Tensor, Tensor | None]: ...

    def outcomes(self, features: Tensor, told: Tensor | None) -> tuple[Tensor, Tensor]: ...


class Stepping:
    """Steps of a dream whose outcomes are asked for once at its end, for models that have no cheaper way."""

    def advance(
        self: Any, state: State, action: Tensor, noise: Noise, temperature: float = 1.0
    ) -> tuple[State, Tensor, Tensor | None]:
        """The arrival state, its features (B, F), and what ``outcomes`` needs besides them (B, *)."""
        step = self.imagine(state, action, noise, temperature)
        return step.state, self.features(step.state), torch.stack([step.reward, step.cont], -1)

    def outcomes(self, features: Tensor, told: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rewards (H, B) and probabilities of going on (H, B), from a dream's features (H, B, F) and told (H, B, *)."""
        assert told is not None
        return told[..., 0], told[..., 1]


class WorldModel(nn.Module, Stepping, ABC):
    """A latent world model. All randomness comes in as `noise`, so that candidates can share it and nothing depends
    on who computes a step."""

    feat_dim: int
    act_dim: int
    phases: tuple[str, ...]
    onehots: tuple[int, int] | None = None
    """(S, K) where the last S * K features are one-hots of S variables of K classes, of which ``compact().features``
    gives the numbers instead, (B, F - S * K + S). Heads that are told of it read both."""

    @abstractmethod
    def initial(self, batch: int) -> State:
        """The state before any observation."""

    @abstractmethod
    def noise(self, batch: int, rng: torch.Generator) -> Noise:
        """All the randomness of one step of `batch` rows, of `posterior` and of `imagine`."""

    @abstractmethod
    def posterior(
        self, state: State, prev_action: Tensor, obs: dict[str, Tensor], is_first: Tensor, noise: Noise
    ) -> State:
        """The state after `prev_action` (B, A) led to `obs` (leaves (B, *)); rows with `is_first` (B,) start anew."""

    @abstractmethod
    def imagine(self, state: State, action: Tensor, noise: Noise, temperature: float = 1.0) -> Step:
        """One step of the dream from `state` under the encoded `action` (B, A)."""

    @abstractmethod
    def features(self, state: State) -> Tensor:
        """(B, F): all that a controller may see."""

    def dreamer(self, precision: str = "fp32") -> Dreamer:
        """What dreams fastest with the weights as they are now, without gradients; `precision` is that of its matrix
        products. The model itself by default."""
        if precision != "fp32":
            raise ValueError(f"got dream.precision={precision!r}, expected fp32: this model knows no other")
        return self

    @abstractmethod
    def decode(self, state: State) -> dict[str, Tensor]:
        """Observations as the environment gives them, for people to look at; empty for decoder-free models."""

    @abstractmethod
    def loss(self, batch: Batch, phase: str, noise: Noise | None = None, states: bool = True) -> Fit:
        """The loss of one of `phases` on a batch of sequences (B, T); `states=False` may leave `Fit.states` empty."""

    def encode(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is computed once a frame and kept for later phases (leaves (N, ...)); the observation itself here."""
        return obs

    def pack(self, state: State) -> dict[str, Tensor]:
        """A state that ``posterior`` gave, as small as it may be kept (leaves (N, *)); here in half precision."""
        return {k: v.half() for k, v in state.items()}

    def unpack(self, packed: dict[str, Tensor]) -> State:
        """The state that ``pack`` was given, in float32."""
        return {k: v.float() for k, v in packed.items()}

    def adapt(self, statistics: dict[str, dict[str, Tensor]]) -> None:
        """Take the scales of the data (of observation columns, rewards, ...) before a fit; nothing by default."""

    @abstractmethod
    def zero_noise(self, batch: int) -> Noise:
        """Noise under which a step takes its most central value: how an agent acts outside a dream."""


def repeat(state: State, times: int) -> State:
    """(E, ...) -> (times * E, ...), the E rows as one block `times` times over."""
    return {k: v.repeat(times, *[1] * (v.dim() - 1)) for k, v in state.items()}


def take(state: State, index: Tensor) -> State:
    """The rows `index` of every leaf."""
    return {k: v[index] for k, v in state.items()}
