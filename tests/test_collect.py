"""The path of a transition from env.step to an Episode: integrity, and the same bits however the work is shared out."""

import copy
import sys

import gymnasium as gym
import numpy as np
import pytest

from raywm.agent import Agent, Exploring, LiveAgent, MixedAgent, RandomAgent, StickyAgent
from raywm.collect import Collector
from raywm.data.episode import validate
from raywm.data.store import EpisodeStore
from raywm.envs.classic import check_counting
from raywm.runtime.pool import WorkerPool
from raywm.runtime.workers import CollectWorker, StoreWorker
from raywm.spaces import ActionCodec

COUNTING = {"id": "raywm/Counting-v0", "kwargs": {"image": True}}


class Listening(Agent):
    """Acts by a running mean of all it has seen, and by chance: its every action depends on its whole past."""

    name = "listening"

    def __init__(self, codec):
        self.codec = codec

    def initial(self, B):
        return np.zeros(B)

    def act(self, obs, state, is_first, rngs):
        seen = np.where(is_first, 0, state) * 0.9 + obs["vector"].sum(-1)
        draws = np.array([rng.random() for rng in rngs])
        return ((seen + 100 * draws) % self.codec.dim).astype(self.codec.dtype), seen


def same(a, b):
    assert a.id == b.id and a.info == b.info
    for (name, left), right in zip(a.columns().items(), b.columns().values(), strict=True):
        assert left.dtype == right.dtype and left.tobytes() == right.tobytes(), name


@pytest.mark.parametrize("envs", [1, 3, 8])
@pytest.mark.parametrize(
    "make", [RandomAgent, StickyAgent, MixedAgent, Listening, lambda c: Exploring(Listening(c), c, 0.3)]
)
def test_integrity_and_grouping(envs, make):
    one = Collector(COUNTING, seed=3, envs=envs)
    agent = make(one.codec)
    whole = {e.id: e for e in one.collect(agent, range(20))}
    assert sorted(whole) == [f"collect-{n:09d}" for n in range(20)]
    for episode in whole.values():
        validate(episode, one.columns, one.codec)
        check_counting(episode)
        assert set(episode.info) == {"number", "seed", "env", "policy", "version", "return"}
    assert len({e.obs["vector"].tobytes() for e in whole.values()}) == 20
    two = Collector(COUNTING, seed=3, envs=envs)
    for numbers in ([19, 2, 3], [0], [1, 4, 5, 6, 7, 8, 9, 10], range(11, 19)):
        for episode in two.collect(agent, numbers):
            same(episode, whole.pop(episode.id))
    assert not whole


def test_streams_and_seeds_differ():
    collector = Collector(COUNTING, seed=3, envs=2)
    agent = RandomAgent(collector.codec)
    (a,) = collector.collect(agent, [0])
    (b,) = collector.collect(agent, [0], stream="evaluate")
    (c,) = Collector(COUNTING, seed=4, envs=2).collect(agent, [0])
    assert len({float(e.obs["vector"][0, 0]) for e in (a, b, c)}) == 3


def test_play_is_collect_without_keeping():
    collector = Collector(COUNTING, seed=1, envs=3)
    agent = Listening(collector.codec)
    kept = {e.info["number"]: e for e in collector.collect(agent, range(7), "trial")}
    played = collector.play(agent, [6, 0, 1, 2, 3, 4, 5], "trial")
    assert [p.number for p in played] == [6, 0, 1, 2, 3, 4, 5]
    for number, ret, steps, info in played:
        assert (ret, steps, info) == (kept[number].ret, kept[number].steps, kept[number].info)


def test_long_episodes_outgrow_and_outlive_the_recording():
    env = {"id": "raywm/Counting-v0", "kwargs": {"lengths": [1, 1500]}}
    collector = Collector(env, seed=0, envs=2)
    lengths = []
    for episode in collector.collect(RandomAgent(collector.codec), range(12)):
        check_counting(episode, (1, 1500))
        lengths.append(len(episode))
    assert max(lengths) > 1024  # more than one doubling, or this proves nothing


def test_closing_early_and_crossing():
    collector = Collector(COUNTING, seed=3, envs=3)
    agent = RandomAgent(collector.codec)
    running = collector.collect(agent, range(9))
    next(running)
    running.close()
    for episode in collector.collect(agent, range(9)):
        check_counting(episode)
    first = collector.collect(agent, range(9))
    next(first)
    next(collector.collect(agent, range(9)))
    with pytest.raises(RuntimeError, match="another collect"):
        next(first)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("nan_obs", r"'raywm/Faulty-v0', episode \d, step 5: observation 'vector' is \[nan nan nan\], expected finite"),
        ("nan_reward", r"'raywm/Faulty-v0', episode \d, step 5: reward nan, expected a finite number"),
        ("raise", r"'raywm/Faulty-v0', episode \d, step 5: RuntimeError: .* was told to fail"),
    ],
)
def test_faults_are_named(fault, message):
    for at, text in ((5, message), (0, message.replace("step 5", "step 0"))):
        collector = Collector({"id": "raywm/Faulty-v0", "kwargs": {"fault": fault, "at": at}}, seed=0, envs=3)
        if at == 0 and fault == "nan_reward":
            continue  # a reset gives no reward
        with pytest.raises(ValueError, match=text):
            list(collector.collect(RandomAgent(collector.codec), [4, 5]))


class Wrong(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(4, np.float32), 0.0, False, False, {}


def test_wrong_shapes_and_endless_episodes_are_named():
    collector = Collector({"id": "test_collect:Wrong"}, seed=0, envs=2)
    with pytest.raises(ValueError, match="'test_collect:Wrong', episode 0, step 1: "):
        collector.play(RandomAgent(collector.codec), [0])
    endless = Collector({"id": "raywm/Faulty-v0", "kwargs": {"steps": 10**9, "fault": None}}, 0, envs=2, max_steps=30)
    with pytest.raises(ValueError, match=r"episode 1, step 30: .*time_limit"):
        endless.play(RandomAgent(endless.codec), [1])


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Discrete(3, start=2),
        gym.spaces.MultiDiscrete([2, 4]),
        gym.spaces.MultiBinary(3),
        gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32)),
        gym.spaces.Box(0, 3, (2,), np.int64),
    ],
)
def test_random_agents_act_within_the_space_and_uniformly(space):
    codec = ActionCodec(space)
    for agent in (
        RandomAgent(codec),
        StickyAgent(codec, 3),
        MixedAgent(codec, 9),
        Exploring(RandomAgent(codec), codec, 0.5),
    ):
        rngs = [np.random.default_rng(i) for i in range(4)]
        state, first, seen = agent.initial(4), np.ones(4, bool), []
        for _ in range(400):
            before = copy.deepcopy(state)
            action, after = agent.act({}, state, first, rngs)
            np.testing.assert_equal(state, before)  # a state is a value
            state, first = after, np.zeros(4, bool)
            assert all(space.contains(a if space.shape else a.item()) for a in action)
            seen.append(codec.encode(action))
        mean = np.stack(seen).mean((0, 1))
        expected = {"box": 0.0, "multi_binary": 0.5}
        for group, size in zip(np.split(mean, np.cumsum(codec.groups)[:-1]), codec.groups, strict=False):
            np.testing.assert_allclose(group, 1 / size, atol=0.12)
        if codec.kind in expected:
            np.testing.assert_allclose(mean, expected[codec.kind], atol=0.12)


def test_sticky_holds():
    codec = ActionCodec(gym.spaces.Box(-1, 1, (1,), np.float32))
    agent, rngs = StickyAgent(codec, hold=10), [np.random.default_rng(0)]
    state, first, actions = agent.initial(1), np.ones(1, bool), []
    for _ in range(2000):
        action, state = agent.act({}, state, first, rngs)
        first = np.zeros(1, bool)
        actions.append(float(action[0, 0]))
    changes = np.flatnonzero(np.diff(actions))
    held = np.diff(changes)
    assert held.min() == 1 and held.max() == 10 and abs(held.mean() - 5.5) < 0.6


def test_live_agent():
    collector = Collector(COUNTING, seed=0)
    live = LiveAgent(Listening(collector.codec), collector.codec, {"vector": collector.columns["vector"]})
    one = live.act(np.zeros(4, np.float32))
    assert np.shape(one) == () and collector.codec.space.contains(one)
    live.reset(3)
    assert live.act({"vector": np.zeros((3, 4))}, is_first=[True, False, False]).shape == (3,)
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(3, 4\)"):
        live.act(np.zeros(4))
    with pytest.raises(ValueError, match="lacks"):
        live.act({"picture": np.zeros((3, 4))})
    live.reset()
    with pytest.raises(ValueError, match=r"reset\(N\)"):
        live.act(np.zeros((3, 4)))


def test_ray_collectors_give_the_same_bits_though_one_is_killed(ray_session, tmp_path):
    fault = {"fault": "kill", "at": 7, "once": str(tmp_path / "killed")}
    env = {"id": "raywm/Faulty-v0", "kwargs": fault}
    here = Collector({**env, "kwargs": {"fault": None}}, seed=5, envs=4)
    agent = RandomAgent(here.codec)
    expected = {e.id: e for e in here.collect(agent, range(24))}
    path = str(tmp_path / "store")
    store = ray_session.remote(StoreWorker).options(num_cpus=0).remote(path, here.columns, here.codec)
    units = [(k, (range(k, k + 4), "collect")) for k in range(0, 24, 4)]
    with WorkerPool(CollectWorker, (env, 5, 4, store), 2, options={"num_cpus": 0.5}, name="collectors") as pool:
        pool.broadcast("set_agent", agent)
        reported = [entry for _, entries in pool.map("collect", units) for entry in entries]
        assert pool.deaths == 1
        played = [p for _, ps in pool.map("play", [(0, ([3, 1], "collect"))]) for p in ps]
    assert sorted(reported) == [(n, 20, 20.0) for n in range(24)]
    assert played == [(3, 20, 20.0), (1, 20, 20.0)]
    ids = sorted(expected)
    assert ray_session.get(store.commit.remote([*ids, "collect-000000099"])) == len(ids)
    assert ray_session.get(store.commit.remote(ids)) == len(ids)
    ray_session.get(store.close.remote())
    ray_session.kill(store)
    with EpisodeStore(path, read_only=True) as kept:
        assert sorted(kept.ids()) == ids
        for id in ids:
            same(kept.get(id), expected[id])


def test_an_environments_error_reaches_the_driver_as_itself(ray_session):
    env = {"id": "raywm/Faulty-v0", "kwargs": {"fault": "nan_obs", "at": 3}}
    with WorkerPool(CollectWorker, (env, 0, 2, None), 1, options={"num_cpus": 0.5}, name="collectors") as pool:
        pool.broadcast("set_agent", RandomAgent(ActionCodec(gym.spaces.Discrete(2))))
        with pytest.raises(ValueError, match="episode 0, step 3") as caught:
            list(pool.map("play", [(0, ([0], "collect"))]))
        assert type(caught.value) is ValueError


def test_collecting_at_random_needs_no_torch():
    import subprocess

    code = "import sys, raywm.collect, raywm.agent; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
