"""A world model of your own, in the whole loop: collect, fit, evolve in its dreams, measure, repeat.

    raywm train cartpole model.kind=custom_world_model:Drift model.kwargs.hidden=64

`raywm.models.base.WorldModel` says what each method promises. A state is a dict of tensors with the batch first, and
all randomness comes in as `noise`: so candidates of one generation meet the same luck.
"""

import torch
from torch import nn
from torch.nn import functional as F

from raywm.models.base import Fit, Step, WorldModel


class Drift(WorldModel):
    """For one vector: the next observation is this one plus what a network says, with Gaussian noise that it learns."""

    phases = ("model",)  # of a fit; `fit.memory_steps` gradient steps each

    def __init__(self, columns, act_dim, hidden=128):
        super().__init__()
        ((self.name, ((size,), image)),) = columns.items()  # {"vector": ((4,), False)}
        self.size = self.feat_dim = size
        self.act_dim = act_dim
        self.net = nn.Sequential(nn.Linear(size + act_dim, hidden), nn.SiLU(), nn.Linear(hidden, 2 * size + 2))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def adapt(self, statistics):  # before every fit: scales of the data
        if self.name in statistics:
            self.mean.copy_(statistics[self.name]["mean"])
            self.std.copy_(statistics[self.name]["std"].clamp(min=1e-3))

    def initial(self, batch):
        return {"x": self.mean.new_zeros(batch, self.size)}

    def noise(self, batch, rng):
        return {"x": torch.randn(batch, self.size, generator=rng, device=rng.device)}

    def zero_noise(self, batch):
        return {"x": self.mean.new_zeros(batch, self.size)}

    def posterior(self, state, prev_action, obs, is_first, noise):  # what is seen is all there is
        return {"x": (obs[self.name] - self.mean) / self.std}

    def predict(self, x, action):
        delta, log_std, reward, cont = self.net(torch.cat([x, action], -1)).split([self.size, self.size, 1, 1], -1)
        return x + 0.1 * delta, log_std.clamp(-5, 1), reward.squeeze(-1), cont.squeeze(-1)

    def imagine(self, state, action, noise, temperature=1.0):
        mean, log_std, reward, cont = self.predict(state["x"], action)
        arrival = mean + temperature**0.5 * log_std.exp() * noise["x"]
        return Step({"x": arrival.clamp(-10, 10)}, reward, torch.sigmoid(cont))

    def features(self, state):  # all that a controller sees
        return state["x"]

    def decode(self, state):
        return {self.name: state["x"] * self.std + self.mean}

    def loss(self, batch, phase, noise=None, states=True):
        x = (batch.obs[self.name] - self.mean) / self.std  # (B, T, D)
        # row t holds the action that led to it: the pair is (x[t], action[t+1]) -> x[t+1], reward[t+1], cont[t+1]
        mean, log_std, reward, cont = self.predict(x[:, :-1], batch.action[:, 1:])
        pair = (batch.mask[:, 1:] & ~batch.is_first[:, 1:]).float()  # (B, T-1)
        nll = (0.5 * ((x[:, 1:] - mean) / log_std.exp()) ** 2 + log_std).mean(-1)
        wrong = (reward - batch.reward[:, 1:]) ** 2
        end = F.binary_cross_entropy_with_logits(cont, (~batch.is_terminal[:, 1:]).float(), reduction="none")
        loss = ((nll + wrong + end) * pair).sum(1) / pair.sum(1).clamp(min=1)  # (B,)
        metrics = {"nll": (nll * pair).sum() / pair.sum(), "reward_mse": (wrong * pair).sum() / pair.sum()}
        return Fit(loss, metrics, {"x": x.flatten(0, 1)}, (batch.mask & ~batch.is_terminal).flatten())
