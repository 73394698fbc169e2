"""Collectors and shards as Ray actors: the same bits, and nothing acknowledged lost, whoever dies or stalls."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from raywm.agent import Agent, RandomAgent
from raywm.collect import Collector
from raywm.config import CollectConfig, EnvConfig, ReplayConfig, parse
from raywm.data.dataset import Dataset
from raywm.data.episode import join, to_table
from raywm.data.mirror import Mirror, claim
from raywm.data.shards import shards_of
from raywm.data.store import EpisodeStore
from raywm.envs.classic import check_counting
from raywm.loops.parts import in_order
from raywm.runtime.collect import collect_dataset
from raywm.seeding import derive
from raywm.spaces import columns_to_json

COUNTING = EnvConfig(id="raywm/Counting-v0")


def rollouts(env, directory, seed=5, replay=ReplayConfig(), **collect):
    from raywm.runtime.rollouts import Rollouts

    here = Collector(env, seed, 1)
    here.close()
    config = CollectConfig(**{"workers": 2, "envs": 4, **collect})
    made = Rollouts(env, config, replay, seed, directory, here.columns, here.codec)
    made.set_agent(RandomAgent(here.codec))
    return made


def same(a, b):
    assert a.id == b.id
    for (name, left), right in zip(a.columns().items(), b.columns().values(), strict=True):
        assert left.dtype == right.dtype and left.tobytes() == right.tobytes(), name


def test_collectors_give_the_same_bits_though_one_is_killed(ray_session, tmp_path):
    fault = {"fault": "kill", "at": 7, "once": str(tmp_path / "killed")}
    env = EnvConfig(id="raywm/Faulty-v0", kwargs=fault)
    plain = Collector({"id": env.id, "kwargs": {"fault": None}}, seed=5, envs=4)
    agent = RandomAgent(plain.codec)
    expected = {e.id: e for e in plain.collect(agent, range(24))}
    work = rollouts(env, tmp_path / "store")
    try:
        assert sorted(work.collect(range(24), "collect")) == [(n, 20, 20.0) for n in range(24)]
        assert work.deaths == 1
        assert work.play([3, 1], "collect") == [(1, 20, 20.0), (3, 20, 20.0)]
        assert sorted(work.collect(range(20, 24), "collect")) == [(n, 20, 20.0) for n in range(20, 24)]
    finally:
        work.close()
    with EpisodeStore(tmp_path / "store", read_only=True) as kept:
        assert kept.ids() == sorted(expected)
        for id, episode in expected.items():
            same(kept.get(id), episode)
            info = kept.get(id).info
            assert info["env_config"]["id"] == "raywm/Faulty-v0" and ":" in info["collector"]


def test_a_broken_environment_speaks_and_a_partly_broken_one_is_counted(ray_session, tmp_path):
    env = EnvConfig(id="raywm/Faulty-v0", kwargs={"fault": "nan_obs", "at": 3})
    work = rollouts(env, tmp_path / "a", workers=1)
    try:
        with pytest.raises(ValueError, match=r"^environment 'raywm/Faulty-v0', episode \d, step 3") as caught:
            list(work.collect(range(8), "collect"))
        assert type(caught.value) is ValueError
    finally:
        work.close()
    env = EnvConfig(id="raywm/Faulty-v0", kwargs={"fault": "raise", "at": 3, "every": 11})
    work = rollouts(env, tmp_path / "b")
    try:
        played = sorted(work.collect(range(40), "collect"))
        broken = [n for n, steps, _ in played if not steps]
        assert [n for n, *_ in played] == list(range(40)) and 0 < len(broken) < 10
    finally:
        work.close()
    with Dataset(tmp_path / "b") as data:
        assert sorted(data.broken) == [f"collect-{n:09d}" for n in broken] and len(data) == 40 - len(broken)
        assert "RuntimeError" in next(iter(data.broken.values()))["broken"]


def test_an_environment_that_stalls_costs_one_collector_and_one_episode(ray_session, tmp_path):
    seeds = Collector({"id": "raywm/Faulty-v0"}, 5, 1)
    env = EnvConfig(id="raywm/Faulty-v0", kwargs={"fault": "stall", "at": 4, "every": 13})
    stalling = [n for n in range(30) if derive(5, "collect", "env", n) % 13 == 0]
    seeds.close()
    assert 0 < len(stalling) < 5
    work = rollouts(env, tmp_path / "a", stall_s=1.0)
    try:
        played = sorted(work.collect(range(30), "collect"))
    finally:
        deaths = work.deaths
        work.close()
    assert [n for n, steps, _ in played if not steps] == stalling and len(played) == 30
    assert deaths == len(stalling)
    with Dataset(tmp_path / "a") as data:
        assert len(data) == 30 - len(stalling)
        assert all("stalled" in info["broken"] for info in data.broken.values()) and len(data.broken) == len(stalling)


def multiples(seed, numbers, every):
    return [n for n in numbers if derive(seed, "collect", "env", n) % every == 0]


def faulty(fault, every, **kwargs):
    return EnvConfig(id="raywm/Faulty-v0", kwargs={"fault": fault, "at": 4, "every": every, **kwargs})


@pytest.mark.slow
def test_stalls_in_one_unit_of_work_do_not_add_up_to_an_error(ray_session, tmp_path):
    seed, numbers = 5, range(60)
    every = next(e for e in range(9, 20) if len(bad := multiples(seed, numbers, e)) == 5 and bad[3] > 40)
    work = rollouts(faulty("stall", every), tmp_path / "a", seed=seed, workers=1, stall_s=0.5)
    work._size = lambda left: 60
    try:
        played = sorted(work.collect(numbers, "collect"))
        assert work.deaths == 5
    finally:
        work.close()
    assert [n for n, steps, _ in played if not steps] == multiples(seed, numbers, every) and len(played) == 60


def test_an_environment_that_takes_its_process_down_costs_its_episode(ray_session, tmp_path):
    seed, numbers = 5, range(32)
    every = next(e for e in range(9, 40) if len(multiples(seed, numbers, e)) == 1)
    bad = multiples(seed, numbers, every)
    work = rollouts(faulty("kill", every), tmp_path / "a", seed=seed)
    work._size = lambda left: 8
    try:
        assert sorted(n for n, steps, _ in work.collect(numbers, "collect") if not steps) == bad
        assert work.deaths in (
            5,
            6,
        )  # with 8 episodes, 4, 2, and alone twice; or first behind a unit whose answer is lost
        # when its return is wanted it is an error, which names it
        with pytest.raises(ChildProcessError, match=f"play of unit {bad[0]} has taken down 4 workers"):
            work.play(bad, "collect")
    finally:
        work.close()
    with Dataset(tmp_path / "a") as data:
        assert len(data) == 31 and data.verify()["ok"]
        (info,) = data.broken.values()
        assert info["number"] == bad[0] and "took 2 collectors down: ActorDiedError" in info["broken"]


@pytest.mark.slow
def test_an_environment_that_always_takes_its_process_down_is_an_error(ray_session, tmp_path):
    work = rollouts(faulty("kill", 1), tmp_path / "a")
    work._size = lambda left: 2
    try:
        with pytest.raises(ValueError, match=r"4 of \d episodes broke, the last of them \d.* took its collector down"):
            list(work.collect(range(100), "collect"))
    finally:
        work.close()


class Clumsy(Agent):
    name = "clumsy"

    def act(self, obs, state, is_first, rngs):
        return {}["left"]


class Unsendable(Agent):
    def __init__(self):
        self.lock = threading.Lock()


class Fifth(gym.Env):
    """The fifth that is made in a process cannot be."""

    observation_space, action_space, made = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), itertools.count(1)

    def __init__(self):
        if next(self.made) == 5:
            raise OSError("no licence is left")

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, True, False, {}


def test_agents_and_environments_that_raise_speak_in_one_line(ray_session, tmp_path):
    work = rollouts(COUNTING, tmp_path / "a")
    try:
        work.set_agent(Clumsy())
        match = "agent 'clumsy' failed in act, playing episodes .*KeyError: 'left'"
        with pytest.raises(ValueError, match=match) as caught:
            list(work.collect(range(8), "collect"))
        assert type(caught.value) is ValueError and "\n" not in str(caught.value)
        with pytest.raises(ValueError, match="agent 'agent' cannot be sent to the collectors: TypeError"):
            work.set_agent(Unsendable())
    finally:
        work.close()
    work = rollouts(EnvConfig(id="test_rollouts:Fifth"), tmp_path / "b", envs=5)
    try:
        with pytest.raises(ValueError, match="'test_rollouts:Fifth' cannot be made.* OSError: no licence is left"):
            list(work.collect(range(8), "collect"))
    finally:
        work.close()


def test_what_is_not_wanted_any_more_is_not_played_on(ray_session, tmp_path):
    env = EnvConfig(id="raywm/Sleep-v0", kwargs={"seconds": 0.002, "length": 50})
    work = rollouts(env, tmp_path / "a", envs=2)
    sizes = itertools.chain([2], itertools.repeat(1000))
    work._size = lambda left: next(sizes)
    try:
        results = work.collect(itertools.count(), "collect")
        assert next(results)[1] == 50
        results.close()
        began = time.monotonic()
        assert len(work.play(range(2), "evaluate")) == 2
        work.settle()
        assert time.monotonic() - began < 60  # 2000 episodes would take 200 s
    finally:
        work.close()


def test_a_shard_begins_again_from_its_storage(ray_session, tmp_path):
    """Its disk is wiped under it; what was uploaded comes back, damaged local segments are fetched again."""
    replay = ReplayConfig(storage=f"file://{tmp_path}/copies", segment_mb=0.001, seal_s=0.5)
    work = rollouts(COUNTING, tmp_path / "a", replay=replay)
    try:
        for first in (0, 10, 20):  # each brings a block, and so a segment, at least
            list(work.collect(range(first, first + 10), "collect"))
        work.settle()
        copies = sorted(os.listdir(tmp_path / "copies"))
        assert len(copies) > 2 and work.shards.ask("stats")[0]["to_upload"] == 0
        ray_session.kill(work.shards.actors[0], no_restart=False)
        for path in (tmp_path / "a").glob("segment*"):
            path.unlink()
        assert len(work.stored("collect", 0)) == 30
        assert sorted(os.listdir(tmp_path / "copies")) == copies
        ray_session.kill(work.shards.actors[0], no_restart=False)
    finally:
        work.close()
    victim = tmp_path / "a" / copies[0]
    victim.write_bytes(victim.read_bytes()[:500])
    work = rollouts(COUNTING, tmp_path / "a", replay=replay)
    try:
        assert len(work.stored("collect", 0)) == 30
    finally:
        work.close()
    with EpisodeStore(tmp_path / "a", read_only=True) as store:
        for id in store.ids():
            check_counting(store.get(id))


def test_a_mirror_keeps_what_is_there_and_fetches_the_newest(tmp_path):
    here = Collector(COUNTING, 0, 2)
    with EpisodeStore(tmp_path / "a", here.columns, here.codec, segment_bytes=1) as store:
        for episode in here.collect(RandomAgent(here.codec), range(6)):
            store.add(episode)
        mirror = Mirror(str(tmp_path / "copies"))
        for path in store.segments():
            mirror.upload(path)
    sizes = mirror.names()
    assert len(sizes) == 6 and not list((tmp_path / "copies").glob("*.part"))
    (tmp_path / "b").mkdir()
    newest = sorted(sizes)[-2:]
    assert sorted(mirror.restore(tmp_path / "b", sum(sizes[name] for name in newest))) == newest
    mine = tmp_path / "b" / sorted(sizes)[0].replace(".arrows", ".open.arrows")
    mine.write_bytes(b"")
    mirror.restore(tmp_path / "b")
    assert mine.exists() and len(os.listdir(tmp_path / "b")) == 6
    with pytest.raises(ValueError, match="expected a path or a URI"):
        Mirror("what://is/this")


def config(**sections):
    return parse({"env": {"id": "raywm/Counting-v0"}, "log": {"console": False}, "collect": {"envs": 4}, **sections})


def test_a_dataset_is_collected_resumed_and_whole(ray_session, tmp_path):
    out = tmp_path / "data"
    done = collect_dataset(config(), str(out), episodes=20, policy="random")
    assert done["episodes"] == 20 and done["broken"] == 0 and done["steps"] == done["new_steps"] > 0
    more = collect_dataset(config(), str(out), steps=2 * done["steps"], policy="random", resume=True)
    assert more["steps"] >= 2 * done["steps"] and more["new_steps"] == more["steps"] - done["steps"]
    alone = collect_dataset(config(), str(tmp_path / "alone"), episodes=20, policy="random", in_process=True)
    with Dataset(out) as data, Dataset(tmp_path / "alone") as other:
        assert data.verify()["ok"] and other.verify()["ok"] and len(data) == more["episodes"]
        assert len(other) == 20 and alone["steps"] == done["steps"]
        for id in other.ids():
            same(data.get(id), other.get(id))
    with pytest.raises(ValueError, match="already holds a dataset"):
        collect_dataset(config(), str(out), episodes=30, policy="random")
    for wrong, match in (({"policy": "sticky"}, "policy random, got sticky"), ({}, "policy random, got mixed")):
        with pytest.raises(ValueError, match=match):
            collect_dataset(config(), str(out), episodes=30, resume=True, **wrong)
    with pytest.raises(ValueError, match="with seed 0, got 3"):
        collect_dataset(config(seed=3), str(out), episodes=30, policy="random", resume=True)
    with pytest.raises(ValueError, match="expected random, sticky, mixed"):
        collect_dataset(config(), str(tmp_path / "x"), policy="randum")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        collect_dataset(config(), str(tmp_path / "full"), policy="random")
    assert not (tmp_path / "x").exists()


def test_a_damaged_dataset_is_repaired_at_resume(ray_session, tmp_path):
    out = tmp_path / "data"
    small = config(replay={"segment_mb": 0.005})
    collect_dataset(small, str(out), episodes=30, policy="random")
    files = sorted(out.glob("segment*"))
    files[0].write_bytes(files[0].read_bytes()[:700])
    bad = bytearray(files[1].read_bytes())
    bad[-300] ^= 4
    files[1].write_bytes(bad)
    with Dataset(out) as data:
        assert not data.verify()["ok"]
    again = collect_dataset(small, str(out), episodes=30, policy="random", resume=True)
    assert again["episodes"] == 30 and again["new_steps"] > 0 and again["set_aside"] == [files[0].name]
    with Dataset(out) as data:
        report = data.verify()
        assert report["ok"] and len(data) == 30 and report["left_aside"] == [f"{files[0].name}.damaged"]
        for episode in data:
            check_counting(episode)


def collecting(out, episodes):
    command = [
        sys.executable,
        "-m",
        "raywm.cli",
        "collect",
        "raywm/Sleep-v0",
        "env.kwargs={seconds: 0.001, length: 40}",
    ]
    return [
        *command,
        "collect.envs=4",
        "--episodes",
        str(episodes),
        "--policy",
        "random",
        "--resume",
        "--out",
        str(out),
    ]


def wait_for_more(out):
    before = sum(p.stat().st_size for p in out.glob("segment*")) if out.exists() else 0
    for _ in range(300):
        time.sleep(0.1)
        if sum(p.stat().st_size for p in out.glob("segment*")) > before:
            break


def test_a_collection_that_is_told_to_stop_says_how_to_go_on(tmp_path):
    """Ray has handlers of its own, which print stacks."""
    out = tmp_path / "data"
    process = subprocess.Popen(collecting(out, 100_000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_more(out)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    (last,) = said.strip().splitlines()
    assert last.startswith("stopped; continue with: raywm collect raywm/Sleep-v0") and last.endswith("--resume")
    with Dataset(out) as data:
        assert len(data)


def test_a_killed_collection_goes_on(tmp_path):
    """kill -9 of the driver with its actors; then the rest, and every episode once."""
    out = tmp_path / "data"
    command = collecting(out, 150)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_more(out)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["episodes"] == 150 and result["new_steps"] < 150 * 40
    with Dataset(out) as data:
        assert data.verify()["ok"] and len(data) == 150


def test_a_trained_policy_and_a_class_of_ones_own_can_play(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nfrom raywm.agent import Agent\n"
        "class Left(Agent):\n"
        "    name = 'left'\n"
        "    def __init__(self, codec):\n        self.codec = codec\n"
        "    def act(self, obs, state, is_first, rngs):\n"
        "        return np.zeros((len(is_first), *self.codec.shape), self.codec.dtype), None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    done = collect_dataset(config(), str(tmp_path / "a"), episodes=3, policy="mine:Left", in_process=True)
    assert done["policy"] == "mine:Left"
    with Dataset(tmp_path / "a") as data:
        assert all(not e.action.any() and e.info["policy"] == "left" for e in data)
    for wrong in ("mine:Right", "nothing:Left", "mine:np"):
        with pytest.raises(ValueError, match="--policy"):
            collect_dataset(config(), str(tmp_path / "b"), policy=wrong, in_process=True)


def test_results_come_in_order_and_with_their_gaps():
    assert list(in_order([(2, 1, 0.0), (0, 1, 0.0), (3, 0, np.nan), (1, 1, 0.0)], 0))[:2] == [(0, 1, 0.0), (1, 1, 0.0)]


def test_a_reader_on_another_node_gets_all_in_parts(tmp_path, monkeypatch):
    from raywm.data.episode import from_block
    from raywm.runtime import shard as shards

    here = Collector(COUNTING, 0, 2)
    shard = shards.ReplayShard(str(tmp_path), None, columns_to_json(here.columns), here.codec, 2**20, None, 60.0)
    episodes = {e.id: e for e in here.collect(RandomAgent(here.codec), range(8))}
    assert shard.add(join(list(episodes.values())[:5])) == 5
    assert [shard.add(to_table(e)) for e in list(episodes.values())[5:]] == [1, 1, 1]
    monkeypatch.setattr(shards, "READ_BYTES", 1000)
    wanted, got = [*sorted(episodes), "collect-000000099"], []
    while wanted:
        block, count = shard.read(wanted)
        got += from_block(block) if block is not None else []
        assert count >= 1
        wanted = wanted[count:]
    assert [e.id for e in got] == sorted(episodes)
    for episode in got:
        same(episode, episodes[episode.id])
    shard.close()
    assert [p.suffix for p in Path(tmp_path).glob("segment*")] == [".arrows"]


@pytest.mark.slow
def test_samples_come_from_all_shards_by_their_share(ray_session, tmp_path):
    """Shares, priorities fed back, prefetching, a shard that dies meanwhile, and no future data at a resume."""
    from raywm.data.prefetch import Prefetch
    from raywm.runtime.shards import ShardedReplay, Shards

    here = Collector(COUNTING, 3, 4)
    episodes = list(here.collect(RandomAgent(here.codec), range(60)))
    node = ray_session.get_runtime_context().get_node_id()
    names = {"shard-000": node, "shard-001": node}
    shards = Shards(tmp_path, here.columns, here.codec, names)
    for n, episode in enumerate(episodes[:40]):
        ray_session.get(shards.actors[n % 4 == 0].add.remote(to_table(episode)))
    replay = ShardedReplay(shards, mode="prioritized", context=1)

    def written(batch):
        """Write every row's own observation as its state, and hold what came with the batch against its rows."""
        states = {"row": batch.obs["vector"].flatten(0, 1).clone().numpy()}
        known = torch.zeros(0, dtype=torch.bool) if batch.known is None else batch.known
        if batch.stored is not None:
            assert torch.equal(batch.stored["row"][known], batch.obs["vector"][known, 0])
        return (batch.rows.reshape(-1), states), {id for id, k in zip(batch.ids, known.tolist()) if k}

    rows = [sum(len(e) for n, e in enumerate(episodes[:40]) if (n % 4 == 0) == side) for side in (False, True)]
    assert len(replay) == sum(rows)
    rng = np.random.default_rng(0)
    of = {e.id: n % 4 == 0 for n, e in enumerate(episodes)}
    batch = replay.sample(256, 5, rng)
    assert batch.weight.tolist() == [1.0] * 256  # all priorities are still the same
    assert abs(sum(of[id] for id in batch.ids) - 256 * rows[1] / sum(rows)) <= 1
    by_id = {e.id: e for e in episodes}
    for b, id in enumerate(batch.ids):
        n, start = (
            int(batch.mask[b].sum()),
            int((by_id[id].obs["vector"] == batch.obs["vector"][b, 0].numpy()).all(1).argmax()),
        )
        assert np.array_equal(batch.obs["vector"][b, :n], by_id[id].obs["vector"][start : start + n])
    replay.write(*written(batch)[0])
    replay.update(batch.keys, np.where([of[id] for id in batch.ids], 100.0, 1e-3))
    mass = [m for _, m in replay._ask("mass")]
    assert mass[1] > mass[0]
    replay.sample(256, 5, rng)  # the shards' masses come with the batches: one is drawn by the old ones
    again = replay.sample(256, 5, rng)
    assert {of[id] for id in written(again)[1]} == {False, True}
    assert sum(of[id] for id in again.ids) > 128 and again.weight.min() < again.weight.max() == 1

    with Prefetch(replay, 8, 5, np.random.default_rng(1), depth=2) as ahead:
        for turn in range(30):
            if turn == 10:
                ray_session.kill(shards.actors[1], no_restart=False)
            assert ahead.next().obs["vector"].shape == (8, 5, 4)

    mark = replay.mark
    later = [e.id for e in episodes[40:]]
    for n, episode in enumerate(episodes[40:]):
        ray_session.get(shards.actors[n % 2].add.remote(to_table(episode)))
    shards.close()
    shards = Shards(tmp_path, here.columns, here.codec, names)
    try:
        restored = ShardedReplay(shards, until=json.loads(json.dumps(mark)), mode="prioritized", context=1)
        batch = restored.sample(64, 4, rng)
        restored.write(*written(batch)[0])
        ray_session.kill(shards.actors[0], no_restart=False)
        before = set(shards_of(batch.rows[:, 0]).tolist())
        while before <= set(shards_of(restored.sample(64, 4, rng).rows[:, 0]).tolist()):  # until it has begun again
            time.sleep(0.05)
        restored.write(*written(batch)[0])  # of the shard that was restarted these are keys of before
        known = {of[id] for _ in range(10) for id in written(restored.sample(64, 4, rng))[1]}
        assert known == {True}
        seen = {id for _ in range(20) for id in restored.sample(64, 4, rng).ids}
        rows = restored._ask("mass")
        restored.update(batch.keys, np.full(64, 9.0))  # of the shard that lives those count, of the other none
        assert [was == now for was, now in zip(rows, restored._ask("mass"), strict=True)] == [True, False]
        batch = restored.sample(64, 4, rng)
        restored.update(batch.keys, np.full(64, 90.0))
        assert restored._ask("mass")[0] != rows[0]
        assert len(seen) > 30 and not seen & set(later)
        restored.release()
        assert len({id for _ in range(20) for id in restored.sample(64, 4, rng).ids} & set(later)) > 10
        with pytest.raises(ValueError, match="did you mean 'recent'"):
            ShardedReplay(shards, mode="recnt", half_life=3)
    finally:
        shards.close()


def test_a_storage_belongs_to_one_run(tmp_path):
    claim(tmp_path / "a", str(tmp_path / "copies"))
    claim(tmp_path / "a", str(tmp_path / "copies"))
    with pytest.raises(ValueError, match="episodes of another run"):
        claim(tmp_path / "b", str(tmp_path / "copies"))
    claim(tmp_path / "b", str(tmp_path / "copies"), adopt=True)
    claim(tmp_path / "b", str(tmp_path / "copies"))


def test_pieces_after_a_lost_beginning_are_left_out(tmp_path):
    here = Collector(COUNTING, 0, 2)
    a, b = here.collect(RandomAgent(here.codec), range(2))
    with EpisodeStore(tmp_path, here.columns, here.codec) as store:
        assert store.add(to_table(a, 3), strict=False) == 0 and store.add(b) == 1
        store.mark(b.id, {"broken": "late"})  # of one that is complete: too late
        assert store.ids() == [b.id] and not store.broken
        assert store.add(a) == 1


def shard_at(path, here, storage=None, **arguments):
    from raywm.runtime.shard import ReplayShard

    arguments = {"segment_bytes": 2**20, "capacity_bytes": None, "seal_s": 0.0} | arguments
    return ReplayShard(str(path), storage and str(storage), columns_to_json(here.columns), here.codec, **arguments)


def pieces(episode, size):
    return [to_table(episode, at, at + size) for at in range(0, len(episode), size)]


def test_two_lives_of_one_shard_lose_and_double_nothing(tmp_path):
    """Its node is lost, it goes on elsewhere, and the node comes back: both wrote a segment 3, of other episodes."""
    here = Collector(COUNTING, 0, 2)
    episodes = list(here.collect(RandomAgent(here.codec), range(12)))
    long = max(episodes[:4], key=len)
    rest = [e for e in episodes if e is not long]
    copies = tmp_path / "copies"
    a = shard_at(tmp_path / "a", here, copies)
    for episode in rest[:2]:
        a.add(to_table(episode))
        a.settle()
    a.add(pieces(long, 3)[0])  # under way, and uploaded
    a.settle()
    a.add(to_table(rest[2]))  # not uploaded; the node is lost
    a.add(pieces(long, 3)[1])
    a._closed.set()
    a.store.seal()
    a.store._release()

    b = shard_at(tmp_path / "b", here, copies)
    assert [n for n, *_ in b.stored("collect", 0)] == sorted(int(e.id[-9:]) for e in rest[:2])
    b.add(to_table(rest[3]))
    b.add(to_table(rest[2]))  # played again, as nobody knew of it
    for piece in pieces(long, 3)[1:]:  # its collector lives
        b.add(piece)
    b.settle()
    b.add(to_table(rest[4]))
    b.close()
    numbers = [int(name[8:16]) for name in os.listdir(tmp_path / "a") if name.startswith("segment")]
    assert set(numbers) & {int(name[8:16]) for name in os.listdir(copies) if name not in os.listdir(tmp_path / "a")}

    for _ in range(2):  # the node is back; once more with what it has uploaded now
        a = shard_at(tmp_path / "a", here, copies)
        a.stored("collect", 0)
        a.close()
    for place in (tmp_path / "a", copies):
        with Dataset(place) as data:
            report = data.verify()
            assert report["ok"] and report["incomplete"] == 0, report
            expected = {e.id: e for e in [*rest[:5], long]}
            assert data.ids() == sorted(expected)
            for episode in data:
                same(episode, expected[episode.id])
    assert sorted(Mirror(str(copies)).names()) == sorted(n for n in os.listdir(tmp_path / "a") if "segment" in n)


def test_what_another_life_left_unfinished_takes_nothing_away(tmp_path):
    """A complete episode stays though another directory began it again, in other pieces, or marked it as broken."""
    here = Collector(COUNTING, 0, 2)
    whole, marked, *_ = here.collect(RandomAgent(here.codec), range(6))
    for name, first in (("a", 4), ("b", 3)):
        with EpisodeStore(tmp_path / name, here.columns, here.codec, segment_bytes=1) as store:
            store.add(to_table(whole, 0, first))
            if name == "a":
                store.add(to_table(whole, first))
                store.add(marked)
            else:
                store.mark(marked.id, {"broken": "here"})
    for to, other in (("a", "b"), ("b", "a")):
        both = tmp_path / f"both-{to}"
        both.mkdir()
        for path in [*(tmp_path / to).iterdir(), *(tmp_path / other).glob("segment*")]:
            (both / path.name).write_bytes(path.read_bytes())
        for read_only in (True, False):
            with EpisodeStore(both, here.columns, here.codec, read_only=read_only) as store:
                assert store.ids() == sorted([whole.id, marked.id]) and not store.broken
                assert store.rows == len(whole) + len(marked) and store.verify()["incomplete"] == 0
                same(store.get(whole.id), whole)


def test_what_is_begun_again_while_a_segment_is_away_takes_nothing_away(tmp_path):
    """It was damaged, say, and comes from the storage again when the same directory has begun its episodes anew."""
    here = Collector(COUNTING, 0, 2)
    whole, marked = here.collect(RandomAgent(here.codec), range(2))
    with EpisodeStore(tmp_path / "a", here.columns, here.codec) as store:
        store.add(join([whole, marked]))
    (path,) = (tmp_path / "a").glob("segment*")
    path.rename(tmp_path / "away")
    with EpisodeStore(tmp_path / "a", here.columns, here.codec, after=1) as store:
        store.add(to_table(whole, 0, 2))
        store.mark(marked.id, {"broken": "here"})
    (tmp_path / "away").rename(path)
    with EpisodeStore(tmp_path / "a", read_only=True) as store:
        assert store.ids() == sorted([whole.id, marked.id]) and not store.broken
        same(store.get(whole.id), whole)


def test_older_names_of_segments_are_read_and_gone_on_with(tmp_path):
    here = Collector(COUNTING, 0, 2)
    first, second, third = here.collect(RandomAgent(here.codec), range(3))
    with EpisodeStore(tmp_path, here.columns, here.codec) as store:
        store.add(first)
        store.add(to_table(second, 0, 2))
    (path,) = tmp_path.glob("segment*")
    path.rename(tmp_path / "segment-00000001.arrows")
    (tmp_path / ".lock").unlink()
    with EpisodeStore(tmp_path, here.columns, here.codec) as store:
        assert store.add(to_table(second, 2)) == store.add(third) == 1
    with EpisodeStore(tmp_path, read_only=True) as store:
        assert store.verify()["damaged"] == [] and len(store) == 3
        for episode in (first, second, third):
            same(store.get(episode.id), episode)


def test_a_restarted_shard_knows_what_was_to_come_later(tmp_path):
    from raywm.runtime.shard import NotOpenError

    here = Collector(COUNTING, 0, 2)
    episodes = list(here.collect(RandomAgent(here.codec), range(30)))
    names = [{e.id for e in part} for part in (episodes[:10], episodes[10:20], episodes[20:])]
    law, rng = (("mode", "prioritized"),), np.random.default_rng(0)

    def seen(shard):
        return set().union(
            *(set(shard.sample(law, 64, 3, int(s), False, None)[0][1]) for s in rng.integers(2**31, size=8))
        )

    shard = shard_at(tmp_path, here)
    shard.open_replay(law, 0)
    for episode in episodes[:10]:
        shard.add(to_table(episode))
    mark = json.loads(json.dumps(shard.replay_mark(law)))
    for episode in episodes[10:20]:
        shard.add(to_table(episode))
    shard.close()

    shard = shard_at(tmp_path, here)  # a resumed run
    aside = shard.open_replay(law, 0, mark)
    assert set(aside) == names[1] and seen(shard) == names[0]
    for episode in episodes[20:]:
        shard.add(to_table(episode))
    assert seen(shard) == names[0] | names[2]
    old = shard.sample(law, 64, 3, 0, False, None)[0][2]
    shard.close()

    shard = shard_at(tmp_path, here)  # the actor alone was restarted
    assert not shard.serves(law)
    with pytest.raises(NotOpenError):
        shard.mass(law)
    shard.update(law, old, np.full(64, 50.0))  # on its way since before: there is nothing to give it to
    assert set(shard.open_replay(law, 2, None, aside)) == names[1] and shard.serves(law)
    assert seen(shard) == names[0] | names[2]
    before = shard.mass(law)
    shard.update(law, old, np.full(64, 50.0))  # these keys now name other rows
    assert shard.mass(law) == before
    shard.update(law, shard.sample(law, 64, 3, 0, False, None)[0][2], np.full(64, 50.0))
    assert shard.mass(law) != before
    shard.release(law)
    assert seen(shard) & names[1]
    shard.close()


def test_collectors_do_not_wait_for_what_a_shard_fetches(tmp_path, monkeypatch):
    """A shard begins again elsewhere, from a slow storage: it takes what comes at once, and has all in the end."""
    import threading

    here = Collector(COUNTING, 0, 2)
    episodes = sorted(here.collect(RandomAgent(here.codec), range(12)), key=lambda e: e.id)
    copies, go, plain = tmp_path / "copies", threading.Event(), Mirror._copy
    a = shard_at(tmp_path / "a", here, copies, segment_bytes=1)
    for episode in episodes[:8]:
        a.add(to_table(episode))
    a.close()

    def slow(source, one, target, two):
        if str(tmp_path / "b") in two:
            assert go.wait(30)
        plain(source, one, target, two)

    monkeypatch.setattr(Mirror, "_copy", staticmethod(slow))
    b = shard_at(tmp_path / "b", here, copies, segment_bytes=1, capacity_bytes=2**20)
    law = (("mode", "steps"),)
    for episode in episodes[8:]:
        assert b.add(to_table(episode)) == 1
    b.mark("collect-000000012", {"broken": "it raised"})
    assert b.add(to_table(episodes[0])) == 1  # nobody knows yet that it is there
    assert {n for n, *_ in b.which("collect", list(range(12)))} == {0, 8, 9, 10, 11}
    b.open_replay(law, 0)
    assert b.mass(law)[0] > 0 and b.stats()["episodes"] == 5
    b._sync()  # what is not here yet was not evicted
    assert len(Mirror(str(copies)).names()) == 8 + 6 and not (go.set() or b._failed)
    assert [n for n, *_ in b.stored("collect", 0)] == [*range(13)]
    assert not b.serves(law)  # told so, the learner opens it again
    b.close()
    numbers = [int(name[8:16]) for name in sorted(os.listdir(tmp_path / "b")) if name.startswith("segment")]
    assert numbers == list(range(1, 15))
    with Dataset(copies) as data:
        assert data.verify()["ok"] and len(data) == 12
        for episode in data:
            check_counting(episode)


def test_a_storage_that_cannot_be_fetched_speaks_up(tmp_path, monkeypatch):
    from raywm.runtime import shard as shards

    here = Collector(COUNTING, 0, 2)
    one, two = here.collect(RandomAgent(here.codec), range(2))
    a = shard_at(tmp_path / "a", here, tmp_path / "copies")
    a.add(to_table(one))
    a.close()
    plain = Mirror._copy

    def away(source, one, target, two):
        raise OSError("the storage is away")

    monkeypatch.setattr(Mirror, "_copy", staticmethod(away))
    monkeypatch.setattr(shards, "TRIES", 1)
    b = shard_at(tmp_path / "b", here, tmp_path / "copies")
    assert b.add(to_table(two)) == 1
    for _ in range(2):
        with pytest.raises(OSError, match="the storage is away"):
            b.stored("collect", 0)
    monkeypatch.setattr(Mirror, "_copy", staticmethod(plain))
    assert len(b.stored("collect", 0)) == 2
    b.close()


def test_a_segment_that_is_damaged_in_the_storage_too_is_not_fetched_for_ever(tmp_path):
    here = Collector(COUNTING, 0, 2)
    episodes = list(here.collect(RandomAgent(here.codec), range(4)))
    a = shard_at(tmp_path / "a", here, tmp_path / "copies", segment_bytes=1)
    for episode in episodes:
        a.add(to_table(episode))
    a.close()
    victim = sorted((tmp_path / "copies").glob("segment*"))[1]
    victim.write_bytes(victim.read_bytes()[:400])
    b = shard_at(tmp_path / "b", here, tmp_path / "copies", segment_bytes=1)
    with pytest.warns(UserWarning, match="set aside"):
        assert len(b.stored("collect", 0)) == 3
    assert b.add(to_table(episodes[1])) == 1 and len(b.stored("collect", 0)) == 4
    b.close()


def test_shards_have_names_of_their_own(ray_session, tmp_path):
    """What another run left on a node in the same path is not taken for this one's; a run finds its own again."""
    from raywm.runtime.shards import place

    a, b = (place(tmp_path / name, True, str(tmp_path / f"copies-{name}")) for name in "ab")
    assert len(a) == len(b) == 1 and a.keys() != b.keys() and next(iter(a)).startswith("shard-000-")
    assert place(tmp_path / "a", True) == a
    (tmp_path / "copies-a" / next(iter(a))).mkdir(parents=True)
    assert place(tmp_path / "elsewhere", True, str(tmp_path / "copies-a")) == a


def test_the_card_says_which_command_it_was(tmp_path):
    out = tmp_path / "data"
    for episodes, made_with in ((3, "the first"), (5, "the second"), (5, "")):
        collect_dataset(
            config(), str(out), episodes=episodes, policy="random", in_process=True, resume=True, made_with=made_with
        )
        with Dataset(out) as data:
            assert data.info()["made_with"] == (made_with or "the second") and len(data) == episodes
