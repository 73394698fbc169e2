"""RLlib's algorithms as baselines: PPO and DreamerV3 in the real environment, and PPO in a run's dream."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from raywm import config as configs
from raywm.bench import rllib_dreamer
from raywm.bench.common import Say, cores, finish, machine
from raywm.config import EnvConfig
from raywm.evaluate import evaluate
from raywm.rllib import DREAM, REAL, SavedPolicy, register

ALGORITHMS = ("ppo", "dreamer", "dream")
REAL_ENVS, DREAM_ENVS = 8, 64  # copies that one EnvRunner plays
# PPO's, in the real environment and in the dream alike; beside them RLlib's defaults
PPO: dict[str, Any] = {
    "lr": 3e-4,
    "lambda_": 0.95,
    "num_epochs": 10,
    "train_batch_size_per_learner": 4096,
    "minibatch_size": 512,
    "vf_loss_coeff": 0.01,  # as in RLlib's tuned example for CartPole-v1
    "vf_clip_param": 1e4,  # its 10 stops the critic from learning returns of hundreds
}
HIDDENS = [64, 64]
Point = tuple[int, float, float]  # steps so far, seconds so far, mean return of the last 100 episodes


def ppo_config(env: str, env_config: dict[str, Any], runners: int, envs: int, seed: int) -> Any:
    """PPO's config in a registered environment. `runners` 0: it samples in its own process."""
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    config = PPOConfig().environment(env, env_config=env_config).training(**PPO).debugging(seed=seed)
    network = DefaultModelConfig(fcnet_hiddens=HIDDENS, fcnet_activation="tanh", vf_share_layers=False)
    config.rl_module(model_config=network)
    mode = "vector_entry_point" if env == DREAM else "sync"
    config.env_runners(num_env_runners=runners, num_envs_per_env_runner=envs, gym_env_vectorize_mode=mode)
    return config


def learn(
    config: Any, seconds: float, target: float | None, save: str | Path, say: Say
) -> tuple[list[Point], dict[str, Any]]:
    """Train until the mean return of the last 100 episodes is `target`, or for `seconds`; save the policy in `save`.

    Returns its learning curve, and "steps", "seconds" (without starting up) and "reached": whether it was the target.
    """
    algorithm = config.build_algo()
    curve: list[Point] = []
    start, told, reached = time.monotonic(), 0.0, False
    try:
        while not reached and (not curve or curve[-1][1] < seconds):
            played = algorithm.train()["env_runners"]
            mean = float(played.get("episode_return_mean", math.nan))
            spent = time.monotonic() - start
            curve.append((int(played["num_env_steps_sampled_lifetime"]), round(spent, 2), mean))
            reached = target is not None and mean >= target
            if spent - told > 20 or reached:
                told = spent
                say(f"{config.env}: {spent:.0f} s, {curve[-1][0]:,} steps, mean return {mean:.1f}")
        algorithm.save_to_path(str(Path(save).absolute()))
    finally:
        algorithm.stop()
    return curve, {"steps": curve[-1][0], "seconds": round(curve[-1][1], 1), "reached": reached}


def in_dream(
    run: str, seconds: float, target: float | None, episodes: int, seed: int, save: str | Path, say: Say
) -> dict[str, Any]:
    """PPO that sees nothing but the dream of a finished run, then `episodes` real episodes of its greedy policy.

    Returns `learn`'s figures with its "curve" in dream steps; "real_steps", those that the run's model was fitted on,
    and "run_seconds" it took; "real", what ``evaluate`` says of the policy in the real environment.
    """
    summary = Path(run) / "summary.json"
    if not summary.is_file():
        raise ValueError(f"{run} has no summary.json: it is no finished run; continue it with --resume")
    told = json.loads(summary.read_text())
    config = ppo_config(DREAM, {"run": str(Path(run).absolute())}, 0, DREAM_ENVS, seed)
    curve, figures = learn(config, seconds, target, save, say)
    spent = {"real_steps": told["real_env_steps"], "run_seconds": told["wall_seconds"]}
    return {"curve": curve, **figures, **spent, "real": _real(save, episodes)}


def in_reality(
    env: EnvConfig, seconds: float, target: float | None, episodes: int, seed: int, save: str | Path, say: Say
) -> dict[str, Any]:
    """PPO in the real environment, as ``in_dream``; its steps are real ones."""
    config = ppo_config(REAL, env.model_dump(mode="json"), cores(), REAL_ENVS, seed)
    curve, figures = learn(config, seconds, target, save, say)
    return {"curve": curve, **figures, "real_steps": figures["steps"], "real": _real(save, episodes)}


def dreamer(env: EnvConfig, seconds: float, target: float | None, seed: int, say: Say) -> dict[str, Any]:
    """RLlib's DreamerV3 in the real environment; its curve is of single episodes, and nothing is evaluated."""
    found = rllib_dreamer.learn(seconds, seed, say, env=env, target=target)
    keep = {"steps": found["env_steps"], "real_steps": found["env_steps"], "seconds": round(found["seconds"], 1)}
    return {"curve": found["episodes"], **keep, "reached": found["reached"], "mean_20": found["mean_20"]}


def _real(save: str | Path, episodes: int) -> dict[str, Any]:
    policy = SavedPolicy(save)
    return evaluate(policy.agent(), policy.env, policy.seed, episodes)


def run(
    environment: str | None,
    algorithms: list[str],
    run: str | None = None,
    seconds: float = 120.0,
    target: float | None = None,
    episodes: int = 100,
    seed: int = 0,
    save: str | Path = "policies",
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Let each of `algorithms` learn, one after the other, for `seconds` or until its mean return is `target`.

    Args:
        environment: a gymnasium id, "module:EnvClass", preset or FILE; None: that of `run`.
        run: a finished run's directory, for "dream"; save: a directory that gets a checkpoint an algorithm.
    """
    import ray

    from raywm.runtime.cluster import connect

    if unknown := sorted(set(algorithms) - set(ALGORITHMS)):
        raise ValueError(f"got algorithms {', '.join(unknown)}, expected some of {', '.join(ALGORITHMS)}")
    if "dream" in algorithms and run is None:
        raise ValueError("PPO in a dream needs a finished run; give it with --run")
    if environment is None:
        if run is None:
            raise ValueError("got no environment and no --run, expected one of them")
        env = configs.load(Path(run) / "config.yaml").env
    else:
        env = configs.load_environment(environment, []).env
    facts = machine("ray", "torch", "gymnasium")
    started = not ray.is_initialized()
    connect(None, cores() + 1, modules=[env.id.split(":")[0]] if ":" in env.id else [])
    register()
    torch.set_num_threads(cores())
    limits = (seconds, target)
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "ppo": lambda: in_reality(env, *limits, episodes, seed, Path(save) / "ppo", say),
        "dreamer": lambda: dreamer(env, *limits, seed, say),
        "dream": lambda: in_dream(str(run), *limits, episodes, seed, Path(save) / "dream", say),
    }
    try:
        found = {name: work[name]() for name in algorithms}
    finally:
        if started:
            ray.shutdown()
    settings = {"env": env.model_dump(mode="json"), "run": run, "seconds": seconds, "target": target, "seed": seed}
    return {"machine": facts, "settings": {**settings, "ppo": PPO, "hiddens": HIDDENS}, "algorithms": found}


def _show(result: dict[str, Any], console: Console) -> None:
    settings = result["settings"]
    table = Table(title=f"RLlib on {settings['env']['id']}, seed {settings['seed']}")
    for column in ("", "learned in", "steps there", "real steps", "seconds", "mean return at the end", "real episodes"):
        table.add_column(column, justify="left" if column in ("", "learned in") else "right")
    for name, one in result["algorithms"].items():
        real = one.get("real")
        last = one["mean_20"] if name == "dreamer" else one["curve"][-1][2]  # DreamerV3's curve is of single episodes
        table.add_row(
            {"ppo": "PPO", "dreamer": "DreamerV3", "dream": "PPO"}[name],
            f"dream of {settings['run']}" if name == "dream" else "reality",
            f"{one['steps']:,}",
            f"{one['real_steps']:,}",
            f"{one['seconds'] + one.get('run_seconds', 0):.0f}",
            "" if last is None else f"{last:.1f}",
            "" if real is None else f"{real['return_mean']:.1f} +- {real['return_std']:.1f} ({real['episodes']})",
        )
    console.print(table)


def main(
    environment: str | None,
    algorithms: str = "ppo,dreamer",
    run_dir: str | None = None,
    seconds: float = 120.0,
    target: float | None = None,
    episodes: int = 100,
    seed: int = 0,
    save: str | Path | None = None,
    as_json: bool = False,
    out: str | Path | None = None,
) -> None:
    """Let them learn and print a table, or JSON with the learning curves; `out` receives the JSON as well."""
    names = [name.strip() for name in algorithms.split(",")]
    with tempfile.TemporaryDirectory(prefix="raywm-rllib-") as directory:
        work = names, run_dir, seconds, target, episodes, seed, save or directory
        finish(lambda say: run(environment, *work, say), _show, as_json, out)
