"""The main job: collect -> fit V and M -> measure the dream -> evolve C in the dream -> try it in reality -> ...

The loop is a row of phases. Each is a function of what the run knew when it began and of the run's seed, and ends with
a checkpoint: so a resumed run goes on at the phase it died in, and ends as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raywm import checkpoint
from raywm.agent import Exploring
from raywm.config import RunConfig
from raywm.evaluate import scripted_actions, summarise
from raywm.learners.cmaes import CMAES
from raywm.learners.reinforce import Reinforce
from raywm.log import RunLog
from raywm.loops.parts import Parts, Played, first_policy, in_order
from raywm.loops.shared import read_shared
from raywm.seeding import derive

BLOCK = 1_000_000  # episode numbers of one iteration; trials take the second half of its block
TRIALS = BLOCK // 2
CALIBRATION_DREAMS = 128
SAVE_EVERY_S = 15.0


class VMC:
    """One run. What it knows is `state` (JSON), the models' tensors, the controller and the search's record.

    Args:
        config: the run's config; out: its directory; executor: who does the work; log: where it is told.
    """

    def __init__(self, config: RunConfig, out: Path, executor: Any, log: RunLog):
        self.config, self.out, self.executor, self.log = config, Path(out), executor, log
        self.parts: Parts = executor.parts
        self.began = time.monotonic()
        self.weights = dict(self.parts.weights)
        self.optimisers: dict[str, Any] = {}
        self.starts: dict[str, Any] = {}
        self.theta = self.parts.controller.start()
        self.record: dict[str, np.ndarray] = {}  # of the search under way
        self.best_weights, self.best_theta = self.weights, self.theta
        self.saved = 0.0
        self.state: dict[str, Any] = {
            "saves": 0,
            "iteration": 0,
            "phase": "collect",
            "accepted": [],
            "real_env_steps": 0,
            "broken_episodes": 0,
            "dream_steps": 0,
            "random": [],
            "best_trial": None,
            "best_iteration": 0,
            "dream_return_mean": None,
            "best_dream_return_mean": None,
            "calibration_gap": None,
            "best_calibration_gap": None,
            "worker_deaths": 0,
            "wall_seconds": 0.0,
            "stopped": None,
        }

    def run(self) -> dict[str, Any]:
        """Go through the phases that are left; returns what `summary.json` holds."""
        self.restore()
        state, summary = self.state, self.out / "summary.json"
        if state["phase"] in ("evaluate", "done") and self._stop() is None:  # a larger budget continues a finished run
            state.update(phase="collect", stopped=None, iteration=state["iteration"] + 1)
        if state["phase"] == "done" and summary.exists():
            done: dict[str, Any] = json.loads(summary.read_text())
            if done["real_return_episodes"] == self.config.evaluate.episodes:
                self.log.say(f"already finished: {state['stopped']}; more iterations or real steps would continue it")
                return done
        phases = ("collect", "fit", "calibrate", "evolve", "evolve_real", "rate", "trial")
        while state["phase"] in phases:
            getattr(self, state["phase"])()
            at = phases.index(state["phase"])
            if at + 1 < len(phases):
                state["phase"] = phases[at + 1]
            elif reason := self._stop():
                state.update(phase="evaluate", stopped=reason)
            else:
                state.update(phase="collect", iteration=state["iteration"] + 1)
            self.save()
        return self.evaluate()

    # ------------------------------------------------------------------------------------------------ reality

    def collect(self) -> None:
        """The first turn: the random policy, until `initial_steps`. Later: C with exploration, some episodes."""
        config, state = self.config.collect, self.state
        if self.config.data is not None:
            return self._share()
        if state["iteration"] == 0:
            self.executor.rollouts.set_agent(self.parts.first_agent())
            played = self._take(0, steps=config.initial_steps, label="collect (random)")
            state["random"] = [p[2] for p in played]
        else:
            count = config.episodes
            if self._spent():
                return
            inner = self.parts.agent(self.weights, self.theta, state["iteration"])
            self.executor.rollouts.set_agent(Exploring(inner, self.parts.codec, config.explore))
            played = self._take(state["iteration"] * BLOCK, episodes=count, label="collect (exploring)")
        if played:
            self._tell("collect", **summarise([p[2] for p in played], [p[1] for p in played]))

    def _share(self) -> None:
        """The episodes of `data`, which are there already, instead of collected ones."""
        if self.state["iteration"]:
            return
        shared = read_shared(self.out)
        self.state["accepted"], self.state["random"] = shared["ids"], [ret for ret, _ in shared["first_policy"]]
        if shared["first_policy"]:
            told = summarise(*zip(*shared["first_policy"]))
            self._tell("collect", data=shared["source"], **told)

    def trial(self) -> None:
        """C without exploration: its episodes decide whether to stop, and are data like any other (but where the data
        is given: then they only decide)."""
        state, count = self.state, self.config.target.episodes
        if self._trial_is_too_dear():  # half a trial must not decide anything
            if state["best_trial"] is None:  # never tried, but the only one there is
                self._keep()
            return
        self.executor.rollouts.set_agent(self.parts.agent(self.weights, self.theta, state["iteration"]))
        stream = "collect" if self.config.data is None else "trial"  # ids of given episodes are not ours to give again
        played = self._take(state["iteration"] * BLOCK + TRIALS, episodes=count, label="trial", stream=stream)
        real = float(np.mean([p[2] for p in played]))
        dreamt = state["dream_return_mean"]
        gap = None if dreamt is None else dreamt - real
        self._tell("trial", **summarise([p[2] for p in played], [p[1] for p in played]), dream_gap=gap)
        self.log.say(
            f"turn {state['iteration']}: real return {real:.1f} over {len(played)} episodes"
            + ("" if dreamt is None else f", {dreamt:.1f} in the dream")
        )
        if state["best_trial"] is None or real >= state["best_trial"]:
            state["best_trial"] = real
            self._keep()

    def _trial_is_too_dear(self) -> bool:
        return self._spent((self.config.target.episodes - 1) * (self.parts.time_limit or 1))

    def _keep(self) -> None:
        """This turn's controller is the best so far."""
        state = self.state
        state["best_iteration"] = state["iteration"]
        for figure in ("dream_return_mean", "calibration_gap"):
            state[f"best_{figure}"] = state[figure]
        self.best_weights, self.best_theta = self.weights, self.theta

    def _take(
        self, first: int, *, steps: int | None = None, episodes: int | None = None, label: str, stream: str = "collect"
    ) -> list[tuple[int, int, float]]:
        """Play episodes from number `first` on and keep them in the order of their numbers, until there are so many
        steps or episodes, or the budget of real steps is spent: what is kept does not depend on who was faster.

        Stored as they come: a run that is killed here plays none of them again. Broken ones do not count."""
        goal = steps if episodes is None else episodes
        taken: list[Played] = []
        total, number = 0, first

        def enough() -> bool:
            return (steps is not None and total >= steps) or len(taken) == episodes or self._spent(total)

        def left() -> float:
            """Episodes still wanted, about."""
            if steps is None or not total:
                return (episodes or 1) - len(taken) if steps is None else math.inf
            return (steps - total) * len(taken) / total

        with self.log.progress(label, goal) as bar:
            while not enough():
                numbers = itertools.count(number) if episodes is None else range(number, number + episodes - len(taken))
                results = self.executor.rollouts.collect(numbers, stream, left)
                with contextlib.closing(results):
                    for played in in_order(results, number):
                        number += 1
                        if not played[1]:
                            self.state["broken_episodes"] += 1
                            continue
                        taken.append(played)
                        total += played[1]
                        bar.advance(1 if episodes else played[1])
                        if enough():
                            break
            self.executor.rollouts.settle()
        if stream == "collect":
            self.state["accepted"] += [f"collect-{t[0]:09d}" for t in taken]
        self.state["real_env_steps"] += total
        return taken

    def _spent(self, more: int = 0) -> bool:
        """Whether, `more` steps on, another episode of full length would overdraw the budget of real steps."""
        budget = self.config.budget.real_steps
        return budget is not None and self.state["real_env_steps"] + more + (self.parts.time_limit or 1) > budget

    # ------------------------------------------------------------------------------------------------ the model

    def fit(self) -> None:
        """V and M, from the weights of the last turn, to all episodes so far."""
        with contextlib.ExitStack() as stack:
            bars: dict[str, Any] = {}

            def report(phase: str, step: int, steps: int, loss: float | None = None) -> None:
                if phase not in bars:
                    stack.close()  # the phase before has ended
                    bars[phase] = stack.enter_context(self.log.progress(f"fit {phase}", steps))
                bars[phase].advance(step - bars[phase].done)
                if loss is not None:
                    bars[phase].set(loss=loss)

            done = self.executor.fit(
                self.weights, self.optimisers, self.state["accepted"], self.state["iteration"], report
            )
        if gone := sorted(set(self.state["accepted"]) - set(done["ids"])):
            self.state["accepted"] = [i for i in self.state["accepted"] if i in set(done["ids"])]
            self.log.say(f"{len(gone)} episodes are gone or damaged and left out: {', '.join(gone[:3])}, ...")
        for row in done["rows"]:
            self._tell("fit", **row)
        self._tell("quality", **done["quality"])
        self.weights, self.optimisers, self.starts = done["weights"], done["optimisers"], done["starts"]

    def calibrate(self) -> None:
        """The policy that collected first, played in the dream from real starts, against its real returns."""
        if not self.state["random"]:
            self.log.say(
                f"no calibration gap: {self.config.data} has no episodes of {first_policy(self.config.collect)}"
            )
            return
        self.executor.load_dream(self.weights, self.starts)
        seeds = [derive(self.config.seed, "calibrate", self.state["iteration"], i) for i in range(CALIBRATION_DREAMS)]
        rngs = [np.random.default_rng(s) for s in seeds]
        agent, horizon = self.parts.first_agent(), self.parts.horizon
        actions = scripted_actions(agent, self.parts.codec, CALIBRATION_DREAMS, horizon, rngs)
        returns, lengths = self.executor.scripted(actions, seeds[0])
        self.state["dream_steps"] += int(lengths.sum())
        gap = float(returns.mean() - np.mean(self.state["random"]))
        self.state["calibration_gap"] = gap
        self._tell(
            "calibration",
            dream_return_mean=float(returns.mean()),
            dream_return_std=float(returns.std()),
            dream_length_mean=float(lengths.mean()),
            real_return_mean=float(np.mean(self.state["random"])),
            calibration_gap=gap,
        )

    # ------------------------------------------------------------------------------------------------ the controller

    def evolve(self) -> None:
        """C in the dream, by CMA-ES or REINFORCE."""
        if self.config.evolve.where == "real":
            return
        self.executor.load_dream(self.weights, self.starts)
        self._search_dream() if self.config.evolve.learner == "cmaes" else self._climb_dream()

    def evolve_real(self) -> None:
        """C in the real environment; its steps count as real ones."""
        evolve = self.config.evolve
        if evolve.where == "dream":
            return
        agent = self.parts.agent(self.weights, self.theta)
        self.executor.rollouts.set_agent(agent)
        es = self._search("real", evolve.sigma if evolve.where == "real" else evolve.sigma / 2)
        episodes = evolve.population * evolve.real_rollouts
        for generation in self._generations(es, evolve.real_generations, "evolve (real)"):
            if self._spent((episodes - 1) * (self.parts.time_limit or 1)):
                break
            first = (self.state["iteration"] * BLOCK + generation) * evolve.real_rollouts
            numbers = range(first, first + evolve.real_rollouts)
            fitness, steps = self.executor.rollouts.real_fitness(es.ask(), numbers, "fitness")
            self.state["real_env_steps"] += steps
            self._generation(es, generation, fitness, "real")
        self._finish_search(es)

    def rate(self) -> None:
        """What the controller that will be tried earns in the dream, wherever it was evolved: for the dream gap."""
        self.executor.load_dream(self.weights, self.starts)
        seed = derive(self.config.seed, "rate", self.state["iteration"])
        self.state["dream_return_mean"], steps = self.executor.rate(self.theta, seed)
        self.state["dream_steps"] += steps
        self._tell("dream", return_mean=self.state["dream_return_mean"])

    def _search_dream(self) -> None:
        evolve, state = self.config.evolve, self.state
        es = self._search("dream", evolve.sigma)
        for generation in self._generations(es, evolve.generations, "evolve (dream)"):
            seed = derive(self.config.seed, "fitness", state["iteration"], generation)
            fitness, steps = self.executor.fitness(es.ask(), seed)
            state["dream_steps"] += steps
            self._generation(es, generation, fitness, "dream")
        self._finish_search(es)

    def _search(self, where: str, sigma: float) -> CMAES:
        """CMA-ES around the present controller, gone through what is recorded of it."""
        evolve = self.config.evolve
        mean = self.record.setdefault("start", self.theta)
        seed = derive(self.config.seed, "cmaes", where, self.state["iteration"])
        es = CMAES(mean, sigma, evolve.population, seed, evolve.separable)
        es.replay(self.record.get("fitness", np.zeros((0, evolve.population))))
        return es

    def _generations(self, es: CMAES, count: int, label: str) -> Iterator[int]:
        with self.log.progress(label, count) as bar:
            bar.advance(len(es.history))
            for generation in range(len(es.history), count):
                yield generation
                bar.advance(1)
                bar.set(best=float(es.history[-1].max()) if es.history else None)

    def _generation(self, es: CMAES, generation: int, fitness: np.ndarray, where: str) -> None:
        es.tell(fitness)
        self.record["fitness"] = np.stack(es.history)
        self._tell(
            "generation",
            generation=generation,
            where=where,
            best=float(fitness.max()),
            mean=float(fitness.mean()),
            worst=float(fitness.min()),
            sigma=es.sigma,
            fitness=[float(f) for f in fitness],
        )
        if time.monotonic() - self.saved > SAVE_EVERY_S:
            self.save()

    def _finish_search(self, es: CMAES) -> None:
        self.theta, self.record = es.mean, {}

    def _climb_dream(self) -> None:
        start = Reinforce(self.parts.controller, self.parts.codec).state() | {"theta": self.theta}
        learner = {k: self.record.get(k, v) for k, v in start.items()}
        done = int(self.record.get("updates", 0))
        with self.log.progress("reinforce (dream)", self.config.evolve.generations) as bar:
            bar.advance(done)
            for update in range(done, self.config.evolve.generations):
                seed = derive(self.config.seed, "reinforce", self.state["iteration"], update)
                learner, metrics = self.executor.reinforce(learner, seed)
                self.state["dream_steps"] += metrics["steps"]
                self.record = {**learner, "updates": np.array(update + 1)}
                self._tell("generation", generation=update, where="dream", mean=metrics["return_mean"])
                if time.monotonic() - self.saved > SAVE_EVERY_S:
                    self.save()
                bar.advance(1)
        self.theta, self.record = learner["theta"], {}

    # ------------------------------------------------------------------------------------------------ ends

    def _stop(self) -> str | None:
        """Why to stop after this turn, if at all."""
        target, state = self.config.target.real_return, self.state
        if target is not None and state["best_trial"] is not None and state["best_trial"] >= target:
            return f"target return {target:g} reached"
        if self._trial_is_too_dear():
            return f"budget of {self.config.budget.real_steps} real steps spent"
        if state["iteration"] + 1 >= self.config.iterations:
            return f"{self.config.iterations} iterations done"
        return None

    def evaluate(self) -> dict[str, Any]:
        """The best controller's final measurement, which decides nothing, and the run's summary."""
        state = self.state
        self.executor.rollouts.set_agent(self.parts.agent(self.best_weights, self.best_theta, state["best_iteration"]))
        with self.log.progress("evaluate", None):
            played = self.executor.rollouts.play(range(self.config.evaluate.episodes), "evaluate")
        returns = [p[2] for p in played]
        mean, dreamt = float(np.mean(returns)), state["best_dream_return_mean"]
        self._tell("evaluate", **summarise(returns, [p[1] for p in played]))
        summary = {
            "env_id": self.config.env.id,
            "seed": self.config.seed,
            "stopped": state["stopped"],
            "real_return_mean": mean,
            "real_return_std": float(np.std(returns)),
            "real_return_episodes": len(returns),
            "random_return_mean": float(np.mean(state["random"])) if state["random"] else None,
            "dream_return_mean": dreamt,
            "dream_gap": None if dreamt is None else dreamt - mean,
            "calibration_gap": state["best_calibration_gap"],
            "real_env_steps": state["real_env_steps"],
            "eval_env_steps": sum(p[1] for p in played),
            "dream_steps": state["dream_steps"],
            "iterations": state["iteration"] + 1,
            "wall_seconds": round(self._wall(), 1),
            "worker_deaths": state["worker_deaths"] + self.executor.deaths,
            "broken_episodes": state["broken_episodes"],
        }
        checkpoint.atomic_write_json(self.out / "summary.json", summary)
        state["phase"] = "done"
        self.save()
        return summary

    def _wall(self) -> float:
        return self.state["wall_seconds"] + time.monotonic() - self.began

    def _tell(self, kind: str, **metrics: Any) -> None:
        at = {"real_env_steps": self.state["real_env_steps"], "wall_seconds": round(self._wall(), 3)}
        self.log.write(kind, iteration=self.state["iteration"], **at, **metrics)

    def save(self) -> None:
        """Everything the run needs to continue, atomically."""
        self.saved = time.monotonic()
        self.state["saves"] += 1
        state = self.state | {
            "wall_seconds": self._wall(),
            "worker_deaths": self.state["worker_deaths"] + self.executor.deaths,
            "log_rows": self.log.rows,
        }
        tensors = {
            "model": self.weights,
            "optimisers": self.optimisers,
            "starts": self.starts,
            "best_model": self.best_weights,
        }
        arrays = {"controller": {"theta": self.theta, "best": self.best_theta}, "search": self.record}
        checkpoint.save(self.out / "checkpoints", state["saves"], tensors=tensors, arrays=arrays, state=state)

    def restore(self) -> None:
        """Go back to the last checkpoint, if there is one, and drop what was logged after it."""
        checkpoint.atomic_write_json(self.out / "spaces.json", self.parts.spaces())
        if checkpoint.latest(self.out / "checkpoints") is None:
            self.log.truncate(0)
            return
        saved = checkpoint.load(self.out / "checkpoints")
        for name in ("model", "best_model"):
            checkpoint.same_parameters(saved.tensors[name], self.weights, self.out, saved.made_by)
        self.state.update(saved.state)
        self.log.truncate(self.state["log_rows"])
        tensors, arrays = saved.tensors, saved.arrays
        self.weights, self.optimisers, self.starts = (
            tensors["model"],
            tensors.get("optimisers", {}),
            tensors.get("starts", {}),
        )
        self.best_weights = tensors["best_model"]
        self.theta, self.best_theta = arrays["controller"]["theta"], arrays["controller"]["best"]
        self.record = dict(arrays.get("search", {}))


def train(config: RunConfig, out: Path, executor: Any, log: RunLog) -> dict[str, Any]:
    """Run, or go on with, a V-M-C run in `out`; returns its summary."""
    return VMC(config, out, executor, log).run()
