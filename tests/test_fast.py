"""Native vector environments: every transition in its place, whichever way they reset."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from test_collect import Listening, same

from raywm.agent import MixedAgent, RandomAgent
from raywm.data.episode import from_block, validate
from raywm.data.store import EpisodeStore
from raywm.envs import make_env
from raywm.envs.classic import CountingEnv, check_counting
from raywm.fast import FastCollector

CARTPOLE = {"id": "CartPole-v1"}


class VectorCounting(VectorEnv):
    """CountingEnv by the row, with a picture; resets in the next step or in the same one."""

    def __init__(self, num_envs, mode="next", fault=None, lengths=(5, 40)):
        modes = {"next": AutoresetMode.NEXT_STEP, "same": AutoresetMode.SAME_STEP, "never": AutoresetMode.DISABLED}
        self.metadata = {"autoreset_mode": modes[mode]}
        self.num_envs, self.mode, self.fault, self.lengths, self.steps = num_envs, mode, fault, lengths, 0
        one = CountingEnv(lengths, image=True)
        self.single_observation_space, self.single_action_space = one.observation_space, one.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.done = np.zeros(num_envs, bool)

    def _first(self):
        return CountingEnv.first(int(self.np_random.integers(CountingEnv.LIMIT)))

    def _observe(self, states):
        return {
            "vector": np.array(states, np.float64),  # another dtype than its space says
            "image": np.stack([CountingEnv.frame(s) for s in states]),
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.states = [self._first() for _ in range(self.num_envs)]
        return self._observe(self.states), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        n, info = self.num_envs, {}
        reward, terminated, truncated = np.zeros(n), np.zeros(n, bool), np.zeros(n, bool)
        for row in range(n):
            if self.done[row] and self.mode == "next":
                self.states[row] = self._first()
                continue
            self.states[row] = CountingEnv.next(self.states[row], int(action[row]))
            length, terminal = CountingEnv.end(self.states[row][0], self.lengths)
            last = self.states[row][1] >= length
            reward[row] = CountingEnv.reward(self.states[row][1])
            terminated[row], truncated[row] = last and terminal, last and not terminal
        self.done = terminated | truncated
        if self.mode == "same" and self.done.any():
            info["final_obs"] = self._observe(self.states)
            for row in self.done.nonzero()[0]:
                self.states[row] = self._first()
        obs = self._observe(self.states)
        if self.steps == 30 and self.fault == "raise":
            raise RuntimeError("told to")
        if self.steps == 30 and self.fault == "nan":
            obs["vector"][2, 1] = np.nan
        return obs, reward, terminated, truncated, info


def vector(**kwargs):
    if "raywm/VectorCounting-v0" not in gym.registry:
        gym.register(
            "raywm/VectorCounting-v0",
            entry_point="raywm.envs.classic:CountingEnv",
            vector_entry_point=VectorCounting,
        )
    return {"id": "raywm/VectorCounting-v0", "kwargs": kwargs}


def episodes_of(collector, agent, steps, **kwargs):
    blocks, played = [], []
    for block, some in collector.blocks(agent, **kwargs):
        blocks.append(block)
        played += some
        if sum(p.steps for p in played) >= steps:
            return [e for b in blocks for e in from_block(b)], played


@pytest.mark.parametrize("mode", ["next", "same"])
@pytest.mark.parametrize("envs", [1, 5])
@pytest.mark.parametrize("how", [{"block_s": 0.0}, {"block_bytes": 60_000, "block_s": 1e9}])
@pytest.mark.parametrize("make", [RandomAgent, MixedAgent, Listening])
def test_every_transition_is_there_once(mode, envs, how, make):
    collector = FastCollector(vector(mode=mode), seed=1, envs=envs, worker=3)
    agent = make(collector.codec)
    episodes, played = episodes_of(collector, agent, 2500, first=7, common={"collector": "f3"}, **how)
    assert len({e.obs["vector"][0, 0] for e in episodes}) == len(episodes) > 60
    for number, episode in enumerate(episodes, 7):
        validate(episode, collector.columns, collector.codec)
        check_counting(episode)
        assert episode.id == f"fast0003-{number:09d}" and episode.info["reproducible"] is False
        assert episode.info["number"] == number and episode.info["collector"] == "f3"
        assert episode.info["return"] == episode.ret and episode.info["policy"] == agent.name
    assert [(p.number, p.ret, p.steps) for p in played] == [(e.info["number"], e.ret, e.steps) for e in episodes]


def test_listening_agents_are_told_where_episodes_begin():
    class Told(RandomAgent):
        """Its action is how many steps ago it was told of a first row."""

        name = "told"

        def initial(self, B):
            return np.zeros(B, np.int64)

        def act(self, obs, state, is_first, rngs):
            state = np.where(is_first, 0, state + 1)
            assert (obs["vector"][is_first, 1] == 0).all()
            return state % self.codec.dim, state

    for mode in ("next", "same"):
        collector = FastCollector(vector(mode=mode), seed=1, envs=4)
        episodes, _ = episodes_of(collector, Told(collector.codec), 1000)
        for episode in episodes:
            np.testing.assert_array_equal(episode.action[1:], np.arange(episode.steps) % 5)


def cartpole_next(obs, action):
    """The state one step on, as CartPole's source has it, in float64: (T, 4), (T,) -> (T, 4)."""
    x, v, theta, omega = obs.astype(np.float64).T
    force, cos, sin = np.where(action == 1, 10.0, -10.0), np.cos(theta), np.sin(theta)
    temp = (force + 0.05 * omega**2 * sin) / 1.1
    alpha = (9.8 * sin - cos * temp) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    acceleration = temp - 0.05 * alpha * cos / 1.1
    return np.stack([x + 0.02 * v, v + 0.02 * acceleration, theta + 0.02 * omega, omega + 0.02 * alpha], 1)


def test_cartpole_obeys_its_physics(tmp_path):
    collector = FastCollector(CARTPOLE, seed=0)
    plain = make_env(CARTPOLE)
    assert collector.columns == dict(plain.observation_space.spaces) and collector.codec.space == plain.action_space
    episodes, _ = episodes_of(collector, RandomAgent(collector.codec), 30_000)
    actions = np.concatenate([e.action[1:] for e in episodes])
    assert abs(actions.mean() - 0.5) < 0.02 and abs(np.mean([e.steps for e in episodes]) - 22) < 1.5
    with EpisodeStore(tmp_path / "store", columns=collector.columns, codec=collector.codec) as store:
        for episode in episodes:
            obs = episode.obs["vector"]
            np.testing.assert_allclose(obs[1:], cartpole_next(obs[:-1], episode.action[1:]), atol=1e-5)
            assert np.abs(obs[0]).max() <= 0.05 and (episode.reward[1:] == 1).all()
            fallen = (np.abs(obs[:, 0]) > 2.4) | (np.abs(obs[:, 2]) > 12 * np.pi / 180)
            np.testing.assert_array_equal(fallen, episode.is_terminal)
        block, _ = next(collector.blocks(RandomAgent(collector.codec)))
        assert store.add(block) == len(store) > 100


def test_time_limits_truncate():
    collector = FastCollector(CARTPOLE | {"time_limit": 12}, seed=0, envs=8)
    episodes, _ = episodes_of(collector, RandomAgent(collector.codec), 2000)
    assert max(e.steps for e in episodes) == 12
    assert any(e.steps == 12 and not e.is_terminal.any() for e in episodes)


@pytest.mark.parametrize("mode", ["next", "same"])
def test_long_episodes_outgrow_the_recording(mode, monkeypatch):
    monkeypatch.setattr("raywm.recording.BLOCK_BYTES", 1)
    collector = FastCollector(vector(lengths=(1, 1500), mode=mode), seed=0, envs=3)
    assert collector.recording.room == 64
    episodes, _ = episodes_of(collector, RandomAgent(collector.codec), 12_000, block_s=1e9, block_bytes=10**9)
    assert max(len(e) for e in episodes) > 1024 and collector.recording.room >= 2048
    for episode in episodes:
        check_counting(episode, (1, 1500))


def test_seeds_workers_and_going_on():
    def some(seed=0, worker=0, first=0):
        collector = FastCollector(CARTPOLE, seed, 8, worker)
        return episodes_of(collector, RandomAgent(collector.codec), 500, first=first, block_s=1e9, block_bytes=20_000)[
            0
        ]

    once, again = some(), some()
    for a, b in zip(once, again, strict=True):
        same(a, b)
    starts = [e.obs["vector"][0].tobytes() for es in (once, some(seed=1), some(worker=1), some(first=50)) for e in es]
    assert len(set(starts)) == len(starts) > 100


@pytest.mark.parametrize(
    "env, message",
    [
        ({"id": "Pendulum-v1"}, "'Pendulum-v1' has no native vector form .*; leave --fast out"),
        ({"id": "raywm.envs.classic:CountingEnv"}, "no native vector form .*; leave --fast out"),
        (CARTPOLE | {"action_repeat": 2}, "action_repeat=2: .* remove action_repeat, or leave --fast out"),
        (CARTPOLE | {"resize": (8, 8), "grayscale": True}, "remove resize, grayscale, or leave --fast out"),
        (vector(gravity=1), "cannot be made as a vector of 4 with {'gravity': 1}: TypeError"),
        (vector() | {"time_limit": 9}, "TypeError: .*max_episode_steps.*time_limit, or leave --fast out"),
        (vector(mode="never"), "autoreset_mode=.*expected AutoresetMode.NEXT_STEP or SAME_STEP; leave --fast out"),
        ({"id": "CartPole-v1", "croop": 1}, "did you mean 'crop'"),
        ({"id": "CartPol-v1"}, "did you mean 'CartPole-v1'"),
    ],
)
def test_what_cannot_be_fast_says_so(env, message):
    with pytest.raises(ValueError, match=message):
        FastCollector(env, seed=0, envs=4)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("nan", r"'raywm/VectorCounting-v0', vector step 30: copy 2: observation 'vector' is .*nan.*leave --fast out"),
        ("raise", "'raywm/VectorCounting-v0', vector step 30: RuntimeError: told to; .*leave --fast out"),
    ],
)
def test_faults_are_named(fault, message):
    collector = FastCollector(vector(fault=fault), seed=0, envs=4)
    with pytest.raises(ValueError, match=message):
        list(collector.blocks(RandomAgent(collector.codec)))
