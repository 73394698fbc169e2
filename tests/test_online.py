"""The online loop with a learner that only counts: train ratio, staleness, deaths, and resumes without a lost row."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from raywm import checkpoint
from raywm.agent import Agent, load_agent
from raywm.cli import app
from raywm.collect import Collector
from raywm.config import parse
from raywm.data.store import EpisodeStore
from raywm.endless import Endless
from raywm.envs.classic import CountingEnv, check_counting
from raywm.log import RunLog
from raywm.loops import online as module
from raywm.loops.online import Online
from raywm.loops.online_work import LocalOnline, OnlineParts
from raywm.loops.saved import Saved

BATCH, SEQUENCE, RATIO = 4, 8, 4.0


class SlowCounting(CountingEnv):
    """A counting environment of at most 1,000 steps a second."""

    def step(self, action):
        time.sleep(0.001)
        return super().step(action)


class CountingLearner:
    """Counts its updates; its weights are their number."""

    def __init__(self, seconds, ranks):
        self.seconds, self.ranks, self.updates, self.known = seconds, ranks, 0, 0

    def update(self, batch):
        assert batch.reward.shape == (BATCH // self.ranks, SEQUENCE + 1)
        if self.ranks > 1:
            torch.distributed.all_reduce(total := torch.ones(1))
            assert total.item() == self.ranks
        assert (batch.reward > 0)[~batch.is_first].all()  # a row of a counting environment
        self.rows = batch.obs["vector"][:, 1:]
        if batch.stored is not None:  # its states are the rows' own observations, which tell every row from all others
            assert torch.equal(batch.stored["row"][batch.known], batch.obs["vector"][:, 0][batch.known])
            self.known += int(batch.known.sum())
        time.sleep(self.seconds)
        self.updates += 1
        return {"updates_mean": torch.tensor(float(self.updates)), "known": torch.tensor(float(self.known))}

    def latents(self):
        return {"row": self.rows.flatten(0, 1).clone()}

    def tensors(self):
        return {"updates": torch.tensor(self.updates)}

    def load(self, tensors):
        self.updates = int(tensors["updates"])

    def policy(self):
        return {"updates": torch.tensor(self.updates)}


class CountingAgent(Agent):
    """Random actions; its state is its age, and its version must be that of its weights."""

    name = "counting"

    def __init__(self, codec, policy, version):
        assert int(policy["updates"]) == version
        self.codec, self.version = codec, version

    def initial(self, B):
        return np.zeros(B, np.int64)

    def act(self, obs, state, is_first, rngs):
        age = np.where(is_first, 0, state)
        return np.stack([self.codec.sample(rng) for rng in rngs]), age + 1


class CountingParts(OnlineParts):
    seconds = 0.001

    def specification(self):
        return {}

    def learner(self, rank=0, ranks=1):
        return CountingLearner(self.seconds, ranks)

    def check(self, tensors, where, made_by):
        assert set(tensors) and where.is_dir()

    def agent(self, policy, version, greedy=False):
        return CountingAgent(self.codec, policy, version)

    def renewed(self, agent, policy, version):
        return self.agent(policy, version)


def config_of(env="raywm/Counting-v0", **changes):
    online = {"steps": 3000, "prefill": 200, "train_ratio": RATIO, "unit": 8, "publish": 2, "staleness": 16}
    online |= {"evaluate_every": 1000, "evaluate_episodes": 3, "checkpoint_s": 0.2, **changes.pop("online", {})}
    data = {
        "algorithm": "dreamer",
        "env": {"id": env},
        "collect": {"workers": 2, "envs": 4, "policy": "random", **changes.pop("collect", {})},
        "dreamer": {"batch": BATCH, "sequence": SEQUENCE, "context": 1, **changes.pop("dreamer", {})},
        "online": online,
        "evaluate": {"episodes": 10},
        "log": {"tensorboard": False, "console": False},
    }
    return parse(data | changes)


def run(config, out, make=LocalOnline, parts=None, watch=None):
    """(the loop, its summary)"""
    with (
        RunLog(out, tensorboard=False, console=False) as log,
        make(config, out, parts=parts or CountingParts(config)) as ex,
    ):
        loop = Online(config, out, ex, log)
        if watch is not None:
            watch(loop)
        return loop, loop.run()


class Rows:
    """Listens to a store: its episodes' rows."""

    def __init__(self):
        self.rows = {}

    def added(self, id, rows, last):
        self.rows[id] = self.rows.get(id, 0) + rows

    def dropped(self, id):
        self.rows.pop(id, None)


def stored(out):
    """Transitions in the stores, those of episodes that never ended too, and ids; every whole episode is checked."""
    steps, ids = 0, []
    for path in {p.parent for p in Path(out).rglob("segment-*")}:
        store = EpisodeStore(path, read_only=True)
        for episode in store.readable(store.ids()):
            check_counting(episode)
        ids += store.ids()

        store.watch(listener := Rows())
        steps += sum(listener.rows.values()) - len(listener.rows)
        store.close()
    assert len(set(ids)) == len(ids)
    return steps, ids


def rows_of(out, kind):
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_orders_do_not_show_in_the_episodes():
    """Whatever the orders' sizes, and where blocks are cut: the same episodes, each transition once, in its place."""

    def play(sizes):
        collector = Collector({"id": "raywm/Counting-v0"}, seed=3, envs=3)
        parts = {}
        endless = Endless(collector, CountingAgent(collector.codec, {"updates": 0}, 0), first=10**10)
        steps = 0
        for size in sizes:
            from raywm.data.episode import from_block

            for block, _, count in endless.advance(size):
                steps += count
                for piece in from_block(block):
                    parts.setdefault(piece.id, []).append(piece)
        collector.close()
        rows = {
            id: np.concatenate([np.column_stack([p.obs["vector"], p.reward, p.is_last]) for p in found])
            for id, found in parts.items()
        }
        assert steps == sum(len(r) - 1 for r in rows.values())
        return rows

    one, many = play([600]), play([1, 7, 200, 2, 90, 300])
    assert one.keys() == many.keys() and len(one) > 60
    assert all(np.array_equal(one[id], many[id]) for id in one)


def test_a_run_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REPORT_S", 0.2)
    config = config_of(target={"real_return": 10**6})
    loop, summary = run(config, tmp_path)
    assert 3000 - config.collect.envs < summary["real_env_steps"] <= 3000
    assert stored(tmp_path)[0] == summary["real_env_steps"]
    assert 0.98 * RATIO <= summary["train_ratio"] <= RATIO
    assert summary["updates"] == int(checkpoint.load(tmp_path / "checkpoints").tensors["learner"]["updates"])
    assert summary["stopped"] == "3000 real steps done" and summary["real_return_episodes"] == 10
    assert summary["staleness_max"] <= config.online.staleness
    episodes, trials, told = (rows_of(tmp_path, kind) for kind in ("episode", "trial", "train"))
    assert len(episodes) == summary["episodes"] > 50 and len(trials) == 3 - 1
    assert all(a["real_env_steps"] <= b["real_env_steps"] for a, b in zip(episodes, episodes[1:]))
    assert max(row["version"] for row in episodes) > 0 and told[-1]["train_ratio"] == summary["train_ratio"]
    assert len({row["number"] for row in episodes}) == len(episodes)
    # a finished run is finished; more steps continue it
    assert run(config, tmp_path)[1] == summary
    more = run(config_of(online={"steps": 4000}), tmp_path)[1]
    assert 3996 <= more["real_env_steps"] <= 4000 and stored(tmp_path)[0] == more["real_env_steps"]
    assert 0.98 * RATIO <= more["train_ratio"] <= RATIO


def test_a_target_ends_the_run_with_the_policy_that_reached_it(tmp_path):
    loop, summary = run(config_of(target={"real_return": 1.0}), tmp_path)
    (trial,) = rows_of(tmp_path, "trial")
    assert summary["stopped"] == "target return 1 reached" and 1000 <= summary["real_env_steps"] < 1500
    saved = checkpoint.load(tmp_path / "checkpoints")
    assert int(saved.tensors["policy"]["updates"]) == saved.state["version"] == trial["version"]


class Killed(Exception):
    pass


def test_killed_in_the_last_evaluation_a_run_only_evaluates(tmp_path):
    config = config_of(target={"real_return": 1.0})

    def watch(loop):
        plain = loop._hear_play

        def hear(answer):
            if loop.state["phase"] == "evaluate":
                raise Killed
            plain(answer)

        loop._hear_play = hear

    with pytest.raises(Killed):
        run(config, tmp_path, watch=watch)
    saved, (trial,) = checkpoint.load(tmp_path / "checkpoints"), rows_of(tmp_path, "trial")
    _, summary = run(config, tmp_path)
    assert summary["stopped"] == "target return 1 reached"
    assert summary["real_env_steps"] == saved.state["real_env_steps"] == stored(tmp_path)[0]
    assert summary["updates"] == saved.state["updates"] and rows_of(tmp_path, "trial") == [trial]
    policy = checkpoint.load(tmp_path / "checkpoints").tensors["policy"]
    assert int(policy["updates"]) == trial["version"]
    _, higher = run(config_of(target={"real_return": 10**6}), tmp_path)  # a higher one is trained for
    assert 2996 <= higher["real_env_steps"] <= 3000 and higher["stopped"] == "3000 real steps done"


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_resume_neither_loses_nor_doubles(tmp_path, how):
    """Killed at arbitrary moments, four times over: replay, counters and the ratio go on as if nothing had been."""
    config, done = config_of(), 0

    def watch(loop):
        plain, at = loop._hear_advance, done + 450

        def hear(answer):
            if loop.collected > at and loop.state["saves"]:
                if how == "killed":
                    raise Killed
                os.kill(os.getpid(), signal.SIGINT)
            plain(answer)

        loop._hear_advance = hear

    for _ in range(4):
        with pytest.raises(Killed if how == "killed" else KeyboardInterrupt):
            run(config, tmp_path, watch=watch)
        done = stored(tmp_path)[0]
    # the last time, somebody else collects
    loop, summary = run(config_of(online={"steps": 4000}), tmp_path)
    assert 3996 <= summary["real_env_steps"] <= 4000 and stored(tmp_path)[0] == summary["real_env_steps"]
    assert 0.98 * RATIO <= summary["train_ratio"] <= RATIO
    assert summary["updates"] == round(summary["train_ratio"] * (summary["real_env_steps"] - 200) / (BATCH * SEQUENCE))
    episodes = rows_of(tmp_path, "episode")
    assert len({row["number"] for row in episodes}) == len(episodes) == summary["episodes"]


def test_what_was_collected_before_the_first_checkpoint_counts(tmp_path):
    config = config_of(online={"checkpoint_s": 3600})

    def watch(loop):
        plain, at = loop._hear_advance, stored(tmp_path)[0] + 450

        def hear(answer):
            plain(answer)
            if loop.collected > at:
                raise Killed

        loop._hear_advance = hear

    for _ in range(2):
        with pytest.raises(Killed):
            run(config, tmp_path, watch=watch)
    assert not (tmp_path / "checkpoints").exists() and stored(tmp_path)[0] > 900
    before = rows_of(tmp_path, "episode")
    _, summary = run(config, tmp_path)
    after = rows_of(tmp_path, "episode")
    assert after[: len(before)] == before and before[0]["version"] < 0 <= after[-1]["version"]
    assert summary["random_return_mean"] == np.mean([row["return"] for row in after if row["version"] < 0])
    assert summary["wall_seconds"] >= before[-1]["wall_seconds"] > 0
    assert 2996 <= summary["real_env_steps"] == stored(tmp_path)[0] <= 3000
    assert 0.98 * RATIO <= summary["train_ratio"] <= RATIO
    assert summary["episodes"] == len({row["number"] for row in rows_of(tmp_path, "episode")})


def test_what_does_not_go_together_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"dreamer.learners: got 3, expected a divisor of dreamer.batch=4"):
        CountingParts(config_of(dreamer={"batch": 4, "learners": 3}))
    with pytest.raises(ValueError, match=r"online.publish: got 20, expected at most online.staleness=16"):
        CountingParts(config_of(online={"publish": 20}))


def test_dreamer_from_the_command_line(tmp_path):
    """The real learner: trained, continued, evaluated, and its agent loaded from the directory alone."""
    small = ["dreamer.batch=2", "dreamer.sequence=4", "dreamer.horizon=3", "dreamer.threads=1", "evaluate.episodes=2"]
    online = ["online.prefill=60", "online.train_ratio=1", "online.evaluate_every=50", "online.evaluate_episodes=1"]
    command = ["train", "dreamer-cartpole", *small, *online, "--out", str(tmp_path), "--in-process", "--resume"]
    for steps in (100, 140):
        result = CliRunner().invoke(app, [*command, f"online.steps={steps}"])
        assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 132 < summary["real_env_steps"] <= 140
    assert summary["updates"] == (summary["real_env_steps"] - 60) // 8  # a batch is 8 rows
    assert rows_of(tmp_path, "train")[-1]["model_loss"] > 0
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--json"])
    assert json.loads(result.stdout)["return_mean"] == summary["real_return_mean"]
    live = load_agent(tmp_path)
    live.reset()
    assert live.act(np.zeros(4, np.float32)) in (0, 1) and live.agent.version == summary["updates"]
    with pytest.raises(ValueError, match="is a run of dreamer, expected one of vmc"):
        Saved(tmp_path)


# ---------------------------------------------------------------------------------------------------------- on Ray


class SlowParts(CountingParts):
    seconds = 0.004


def ray_online(*args, **kwargs):
    from raywm.runtime.online import RayOnline

    return RayOnline(*args, say=lambda text: None, **kwargs)


def test_collectors_and_a_learner_die_on_ray(ray_session, tmp_path):
    """One of two collectors and of two learners, which are a group: each costs its restart. The ratio holds, staleness
    keeps its bound, both sides work at once, no row is lost."""
    online = {"steps": 6000, "evaluate_every": 2500}
    config = config_of("test_online:SlowCounting", online=online, dreamer={"learners": 2, "threads": 1})
    ages, began, spans = [], {}, {"advance": [], "update": []}

    def watch(loop):
        plain, order = loop.executor.wait, loop.executor.order
        left = {2000: "collect", 3500: "learn"}

        def wait(timeout):
            at = next((at for at in left if loop.collected > at and loop.state["saves"]), None)
            if at is not None and loop.executor.pids()[left[at]]:
                os.kill(loop.executor.pids()[left.pop(at)][-1], signal.SIGKILL)
            answers = plain(timeout)
            for answer in answers:
                if answer.what in spans:
                    spans[answer.what].append((began[answer.post.name], time.monotonic()))
            return answers

        def ordered(post, method, *args):
            began[post.name] = time.monotonic()
            if method == "advance" and (version := loop.seats[post.name].version) >= 0:
                ages.append(loop.updates - version)
            order(post, method, *args)

        loop.executor.wait, loop.executor.order = wait, ordered

    loop, summary = run(config, tmp_path, ray_online, SlowParts(config), watch)
    assert summary["worker_deaths"] == 2
    assert rows_of(tmp_path, "train")[-1]["known"] > 0  # states came back through the shard, to the right rows
    assert 6000 - 4 < summary["real_env_steps"] <= 6000
    assert 0.98 * RATIO <= summary["train_ratio"] <= RATIO
    assert summary["updates"] == int(checkpoint.load(tmp_path / "checkpoints").tensors["learner"]["updates"])
    assert max(ages) <= config.online.staleness  # what collectors are sent out with
    # Dead collectors took their running orders along: stored, perhaps, and not told.
    extra = stored(tmp_path)[0] - summary["real_env_steps"]
    assert 0 <= extra <= config.online.unit * config.collect.envs
    assert len(rows_of(tmp_path, "trial")) == 2
    learning = sum(stop - start for start, stop in spans["update"])
    pairs = itertools.product(spans["update"], spans["advance"])
    both = sum(max(0.0, min(stop, end) - max(start, begin)) for (start, stop), (begin, end) in pairs)
    assert both > 0.5 * learning  # of up to 2, for two collectors


DRIVER = """
import sys
from pathlib import Path
import test_online as t
from raywm.runtime.online import RayOnline
from raywm.log import RunLog
from raywm.loops.online import Online
config = t.config_of("test_online:SlowCounting", collect={"workers": 1}, online={"steps": 100_000})
out = Path(sys.argv[1])
with RunLog(out, False, False) as log, RayOnline(config, out, parts=t.CountingParts(config)) as executor:
    Online(config, out, executor, log).run()
"""


def saved_steps(out):
    try:
        return checkpoint.load(out / "checkpoints", read_only=True).state["governor"]["collected"]
    except (FileNotFoundError, ValueError):  # none yet, or it went away meanwhile
        return 0


def test_the_driver_is_killed(ray_session, tmp_path):
    """kill -9 in the middle, then on with other collectors: what the store holds is what the run counts."""
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], env=env, start_new_session=True)
    try:
        until = time.monotonic() + 180
        while saved_steps(tmp_path) < 500:
            assert driver.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait()
    before = len(rows_of(tmp_path, "episode"))
    saved = checkpoint.load(tmp_path / "checkpoints")
    time.sleep(1)  # its Ray goes too
    held = stored(tmp_path)[0]
    assert held >= saved.state["governor"]["collected"] and before
    config = config_of("test_online:SlowCounting", online={"steps": held + 1000})
    loop, summary = run(config, tmp_path, ray_online, CountingParts(config))
    assert 0 <= held + 1000 - summary["real_env_steps"] < 4
    assert stored(tmp_path)[0] == summary["real_env_steps"]
    assert 0.98 * RATIO <= summary["train_ratio"] <= RATIO
    episodes = rows_of(tmp_path, "episode")
    assert len({row["number"] for row in episodes}) == len(episodes) == summary["episodes"] >= before
