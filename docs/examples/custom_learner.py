"""A learner of your own in the dreams of a finished run: the cross-entropy method on its controller.

    python custom_learner.py runs/cartpole-seed0

A learner needs no base class and no registry: `dream_returns` plays any policy in any world model, `evaluate` plays any
agent in reality. For gradients through a dream there is `raywm.dream.dream`.
"""

import sys

import numpy as np
import torch

from raywm.controllers import PopulationPolicy
from raywm.dream import dream_returns
from raywm.evaluate import evaluate
from raywm.loops.saved import Saved
from raywm.models.base import take


def learn(run, generations=15, population=48, dreams=8, elite=8, seed=0):
    """The mean controller (D,) of the elite after so many generations, from nothing; no real step is taken."""
    rng, torch_rng = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model, dim = run.model, run.controller.size
    mean, std = np.zeros(dim), np.ones(dim)
    for generation in range(generations):
        theta = mean + std * rng.standard_normal((population, dim))  # (P, D)
        policy = PopulationPolicy(run.controller, run.codec, torch.tensor(theta, dtype=torch.float32))
        rows = torch.randint(len(next(iter(run.starts.values()))), (dreams,), generator=torch_rng)
        start = model.posterior(  # dreams begin where episodes do
            model.initial(dreams),
            torch.zeros(dreams, model.act_dim),
            take(run.starts, rows),
            torch.ones(dreams, dtype=torch.bool),
            model.noise(dreams, torch_rng),
        )
        returns, _ = dream_returns(model, policy, start, run.horizon, torch_rng, candidates=population)
        fitness = returns.view(population, dreams).mean(1).numpy()  # (P * E,) -> (P,)
        best = theta[np.argsort(-fitness)[:elite]]
        mean, std = best.mean(0), best.std(0) + 0.05
        print(f"generation {generation}: {fitness.mean():.1f} in the dream, best {fitness.max():.1f}")
    return mean


if __name__ == "__main__":
    run = Saved(sys.argv[1])
    agent = run.agent()
    theirs = evaluate(agent, run.config.env, seed=1, episodes=10)
    agent.theta = learn(run)
    ours = evaluate(agent, run.config.env, seed=1, episodes=10)
    print(f"in reality: {ours['return_mean']:.1f}; the run's own controller: {theirs['return_mean']:.1f}")
