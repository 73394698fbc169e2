"""RLlib's DreamerV3 as a contender: its learner alone, and a whole run on CartPole-v1."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from raywm.bench.common import Say, Work, cores, machine
from raywm.bench.flops import Products
from raywm.config import EnvConfig
from raywm.rllib import REAL, register

MODULE = "default_policy"
SIZE, RATIO = "XS", 1024  # of its tuned example for CartPole-v1
LOSSES = ("WORLD_MODEL_L_total", "ACTOR_L_total", "CRITIC_L_total")


def learner(
    observation: gym.spaces.Box, actions: int, shape: tuple[int, int], horizon: int
) -> tuple[Any, Callable[[], dict[str, float]]]:
    """Its learner, and what makes one whole update (model, actor, critic and its average) on a fixed random batch of
    `shape` (B, T) and tells the losses. Images are float32 in [-1, 1), as its wrapper NormalizedImageEnv makes them."""
    from ray.rllib.algorithms.dreamerv3 import DreamerV3Config
    from ray.rllib.policy.sample_batch import SampleBatch

    action_space: gym.Space = gym.spaces.Discrete(actions)
    config = DreamerV3Config().environment(observation_space=observation, action_space=action_space)
    config.training(model_size=SIZE, batch_size_B=shape[0], batch_length_T=shape[1], horizon_H=horizon)
    config.learners(num_learners=0)
    spec = config.get_multi_rl_module_spec(spaces={MODULE: (observation, action_space)})
    built = config.get_default_learner_class()(config=config, module_spec=spec)
    built.build()
    rng = np.random.default_rng(0)
    taken = rng.integers(actions, size=shape)
    first, last = np.zeros(shape, bool), np.zeros(shape, bool)
    first[:, [0, shape[1] // 6 + 1]] = last[:, shape[1] // 6] = True  # an episode ends in every sequence
    image = len(observation.shape) == 3
    obs = rng.uniform(-1, 1, (*shape, *observation.shape)) if image else rng.normal(size=(*shape, *observation.shape))
    sample = {
        "obs": obs.astype(np.float32),
        "actions": np.eye(actions, dtype=np.float32)[taken],
        "actions_ints": taken,
        "rewards": rng.normal(size=shape).astype(np.float32),
        **{"is_first": first, "is_last": last, "is_terminated": last, "is_truncated": np.zeros(shape, bool)},
    }

    def update() -> dict[str, float]:
        batch = SampleBatch(sample).as_multi_agent()
        told = built.update(batch=batch, timesteps={"num_env_steps_sampled_lifetime": 0})[MODULE]
        return {name: float(told[name].peek() if hasattr(told[name], "peek") else told[name]) for name in LOSSES}

    return built, update


def parameters(built: Any) -> int:
    """Of model, actor and critic; its critic's average is not counted."""
    module = built.module[MODULE].unwrapped()
    return sum(p.numel() for name, p in module.dreamer_model.named_parameters() if "ema" not in name)


def works(observation: gym.spaces.Box, actions: int, shape: tuple[int, int], horizon: int) -> dict[str, Work]:
    """What a process of ``bench.common.Group`` measures: "update", and "facts" once."""
    torch.set_num_threads(cores())
    built, update = learner(observation, actions, shape, horizon)
    with Products() as products:
        losses = [update()]
    losses.append(update())
    facts = {"parameters": parameters(built), "flop": products.flop, "losses": losses}

    def work() -> float:
        update()
        return 1.0

    return {"facts": lambda: facts, "update": work}  # type: ignore[dict-item, return-value]


def learn(
    seconds: float, seed: int, say: Say, env: EnvConfig | None = None, target: float | None = None
) -> dict[str, Any]:
    """Its whole algorithm with its settings for CartPole-v1, for so long, or until the mean of 20 episodes is `target`:
    what it played, in real steps and time. `env`: CartPole-v1 where None.

    Returns:
        "episodes": [real steps so far, seconds so far, return] of each, where several end in one iteration (as in its
        first, of random actions) their mean; "mean_20" of the last 20 and "best_mean_20" of any 20 in a row, None
        before there are as many; "reached": whether that was the target; "env_steps", "updates" and "seconds" (without
        starting up).
    """
    import ray
    from ray.rllib.algorithms.dreamerv3 import DreamerV3Config

    from raywm.runtime.cluster import connect

    facts = machine("ray", "torch")
    started = not ray.is_initialized()
    connect(None, 1)
    register()
    env = env or EnvConfig(id="CartPole-v1")
    config = DreamerV3Config().environment(REAL, env_config=env.model_dump(mode="json")).debugging(seed=seed)
    config.training(model_size=SIZE, training_ratio=RATIO).learners(num_learners=0)
    torch.set_num_threads(cores())
    algorithm = config.build_algo()
    episodes: list[tuple[int, float, float]] = []
    steps, updates, seen, told, reached = 0, 0, 0, 0.0, False
    start = time.monotonic()
    try:
        while not reached and (spent := time.monotonic() - start) < seconds:
            result = algorithm.train()
            played = result["env_runners"]
            steps = int(played["num_env_steps_sampled_lifetime"])
            updates += 1
            if (count := int(played.get("num_episodes_lifetime", 0))) > seen:  # it smooths over one episode
                seen, spent = count, time.monotonic() - start
                episodes.append((steps, round(spent, 2), float(played["episode_return_mean"])))
                last = [e[2] for e in episodes[-20:]]
                reached = target is not None and len(last) == 20 and sum(last) / 20 >= target
            if spent - told > 60:
                told = spent
                say(f"{spent:.0f} s, {steps} steps, last returns {[e[2] for e in episodes[-5:]]}")
    finally:
        algorithm.stop()
        if started:
            ray.shutdown()
    returns = [e[2] for e in episodes]
    means = [float(np.mean(returns[i : i + 20])) for i in range(len(returns) - 19)]
    return {
        "machine": facts,
        "settings": {"model_size": SIZE, "training_ratio": RATIO, "seed": seed, "environment": env.id},
        "seconds": time.monotonic() - start,
        "reached": reached,
        "env_steps": steps,
        "updates": updates,
        "episodes": episodes,
        "mean_20": means[-1] if means else None,
        "best_mean_20": max(means) if means else None,
        "last_return": returns[-1] if returns else math.nan,
    }
