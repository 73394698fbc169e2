"""The dream as an environment: gymnasium's rules, and the very dream that `dream` and `dream_returns` have."""

import shutil
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import raywm.envs  # noqa: F401  registers raywm/Dream-v0
from raywm import config as configs
from raywm.data.episode import Episode
from raywm.dream import dream, dream_returns
from raywm.envs.dream_env import DreamEnv, DreamSource, DreamVectorEnv
from raywm.evaluate import encoded_actions
from raywm.log import RunLog
from raywm.loops.online import train
from raywm.loops.online_work import LocalOnline
from raywm.models import build_model
from raywm.spaces import ActionCodec

COLUMNS = {"vector": gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)}
SIZES = {
    "vm": {"hidden": 12, "mixtures": 2, "head_hidden": 8},
    "rssm": {"deter": 16, "stoch": 3, "classes": 4, "units": 16, "hidden": 16},
}
DISCRETE = gym.spaces.Discrete(3, start=1)
BOX = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32))


def episode(number, steps, codec, terminal=True):
    rng = np.random.default_rng(number)
    first, last, ended = np.zeros((3, steps + 1), bool)
    first[0] = last[-1] = True
    ended[-1] = terminal
    action = np.stack([codec.zero(), *(codec.sample(rng) for _ in range(steps))])
    obs = {"vector": rng.normal(size=(steps + 1, 4)).astype(np.float32)}
    reward = np.r_[0, np.ones(steps)].astype(np.float32)
    return Episode(f"collect-{number:09d}", obs, action, reward, first, last, ended, {})


def source(kind, space=DISCRETE, cont=0.0, horizon=20, temperature=1.0):
    """A random model's dreams; `cont` is added to its ends' log-odds of going on."""
    torch.manual_seed(0)
    codec = ActionCodec(space)
    columns = {name: (box.shape, False) for name, box in COLUMNS.items()}
    model = build_model(kind, columns, codec.dim, **SIZES[kind]).eval()
    with torch.no_grad():
        if kind == "vm":
            model.memory.end[-1].bias.sub_(cont)
        else:
            list(model.cont.parameters())[-1].add_(cont)
            for parameter in model.reward.parameters():  # which begins with zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
    episodes = [episode(i, 5 + i, codec, terminal=i != 1) for i in range(4)]
    return DreamSource(model.requires_grad_(False), codec, COLUMNS, episodes, horizon, temperature)


def both(test):
    return pytest.mark.parametrize("kind", ["vm", "rssm"])(test)


def play(env, steps, seed):
    """Everything that `steps` steps of scripted actions bring, after a seeded reset."""
    env.action_space.seed(1)
    seen = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        seen += [obs, reward, terminated, truncated]
    return seen


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@both
@pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["discrete", "box"])
@pytest.mark.parametrize("settings", [{}, {"observe": "decoded", "starts": "any"}], ids=["features", "decoded"])
def test_gymnasium_finds_no_fault(kind, space, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for known in ("infinity", "alternative render", "not within"):
            warnings.filterwarnings("ignore", f".*{known}")
        warnings.filterwarnings("ignore", ".*symmetric and normalized")  # the real environment's actions
        check_env(DreamEnv(source(kind, space), **settings))
    envs = DreamVectorEnv(source(kind, space), 5, **settings)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert envs.single_action_space == space
    obs, info = envs.reset(seed=0)
    for _ in range(30):
        assert obs in envs.observation_space and info == {}
        obs, reward, terminated, truncated, info = envs.step(envs.action_space.sample())
        assert reward.shape == terminated.shape == truncated.shape == (5,)
        assert terminated.dtype == truncated.dtype == bool


@both
def test_a_seed_fixes_all_that_follows(kind):
    envs, same = (DreamVectorEnv(source(kind), 4, horizon=6) for _ in range(2))
    first = play(envs, 20, 3)
    assert equal(first, play(same, 20, 3)) and equal(first, play(envs, 20, 3))
    assert not equal(first, play(envs, 20, 4))
    one, two = envs.reset()[0], envs.reset()[0]
    assert not np.array_equal(one, two)
    same.reset(seed=4)
    envs.reset(seed=4)
    assert np.array_equal(envs.reset()[0], same.reset()[0])


@both
def test_a_step_is_a_step_of_the_dream(kind):
    """The same start, actions and noise: features, rewards and chances are those of `dream`."""
    made = source(kind, cont={"vm": 0.0, "rssm": 1.5}[kind], temperature=1.3)
    envs = DreamVectorEnv(made, 16, horizon=50)
    obs, _ = envs.reset(seed=5)
    start, rng = {k: v.clone() for k, v in envs._state.items()}, torch.Generator()
    rng.set_state(envs._steps_rng.get_state())
    actions = [np.array([made.codec.sample(np.random.default_rng((t, i))) for i in range(16)]) for t in range(8)]
    drawn = []

    class Model:
        """The model, whose noise comes with the draw of the ends between two steps, as in an environment."""

        def noise(self, batch, generator):
            noise = made.model.noise(batch, generator)
            drawn.append(torch.rand(batch, generator=generator))
            return noise

        def __getattr__(self, name):
            return getattr(made.model, name)

    with torch.no_grad():
        policy = lambda features, t: torch.from_numpy(made.codec.encode(actions[t]))  # noqa: E731
        told = dream(Model(), policy, start, 8, rng, 1.3)
    alive = np.ones(16, bool)
    for t in range(8):
        assert np.allclose(obs[alive], told.features[t].numpy()[alive], atol=1e-5)
        obs, reward, terminated, _, _ = envs.step(actions[t])
        assert np.allclose(reward[alive], told.reward[t].numpy()[alive], atol=1e-5)
        assert np.array_equal(terminated[alive], (drawn[t] >= told.cont[t]).numpy()[alive])
        alive &= ~terminated
    assert alive.any() and not alive.all()


@both
def test_first_episodes_are_those_of_dream_returns(kind):
    made = source(kind, cont=2.0, temperature=0.8)
    envs = DreamVectorEnv(made, 64, horizon=20)
    obs, _ = envs.reset(seed=2)
    start, rng = {k: v.clone() for k, v in envs._state.items()}, torch.Generator()
    rng.set_state(envs._steps_rng.get_state())
    choose = lambda features: 1 + (np.asarray(features)[:, :2].sum(-1) * 50).astype(int) % 3  # noqa: E731
    policy = lambda features, t: torch.from_numpy(made.codec.encode(choose(features)))  # noqa: E731
    returns, lengths = dream_returns(made.model.dreamer(), policy, start, 20, rng, 0.8)
    total, length, alive = np.zeros(64), np.zeros(64), np.ones(64, bool)
    for _ in range(20):
        obs, reward, terminated, truncated, _ = envs.step(choose(obs))
        total += reward * alive
        length += alive
        alive &= ~(terminated | truncated)
    assert not alive.any() and len(set(length)) > 3
    assert np.array_equal(length, lengths.numpy())
    assert np.allclose(total, returns.numpy(), atol=1e-4)


@both
def test_ends_are_truncations_or_terminations(kind):
    endless = DreamVectorEnv(source(kind, cont=50.0), 3, horizon=4)
    endless.reset(seed=0)
    for t in range(1, 11):  # 4 steps, and one that begins anew
        _, reward, terminated, truncated, _ = endless.step(endless.action_space.sample())
        assert not terminated.any() and (truncated == (t % 5 == 4)).all()
        assert (reward == 0).all() == (t % 5 == 0)
    brief = DreamVectorEnv(source(kind, cont=-50.0), 3, horizon=1)
    brief.reset(seed=0)
    _, _, terminated, truncated, _ = brief.step(brief.action_space.sample())
    assert terminated.all() and not truncated.any()  # as real environments at their last step: it does not go on


@both
def test_what_ended_begins_anew_with_the_next_step(kind):
    made = source(kind, cont=1.0)
    envs = DreamVectorEnv(made, 16, observe="decoded", horizon=30)
    envs.reset(seed=0)
    begun, ended = 0, np.zeros(16, bool)
    firsts = DreamVectorEnv(made, 256, observe="decoded").reset(seed=1)[0]
    for _ in range(40):
        obs, reward, terminated, truncated, _ = envs.step(np.full(16, 1))
        assert not (terminated | truncated)[ended].any() and (reward[ended] == 0).all()
        if kind == "vm":  # whose identity vision decodes to what was there
            assert all(np.isclose(firsts, row, atol=1e-5).all(1).any() for row in obs[ended])
        begun, ended = begun + ended.sum(), terminated | truncated
    assert begun > 20


def test_starts_amid_episodes_are_folded_posteriors():
    made = source("vm")
    envs = DreamVectorEnv(made, 1, starts="any")
    expected = []
    for one in made.episodes:
        state, actions = made.model.initial(1), torch.from_numpy(encoded_actions(one, made.codec))
        for t in range(len(one)):
            obs = {"vector": torch.from_numpy(one.obs["vector"][t : t + 1])}
            noise = made.model.zero_noise(1)  # its vision is certain
            state = made.model.posterior(state, actions[t : t + 1], obs, torch.tensor([t == 0]), noise)
            if not one.is_terminal[t]:
                expected.append(torch.cat([state[k][0] for k in ("z", "h", "c")]))
    found = torch.cat([envs._pool[k] for k in ("z", "h", "c")], 1)
    assert len(found) == len(expected) == sum(len(e) for e in made.episodes) - 3  # one of four was truncated
    gaps = (found[:, None] - torch.stack(expected)).abs().amax(-1)
    assert gaps.amin(1).max() < 1e-5 and gaps.amin(0).max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"starts": "last"}, "expected one of first, any"),
        ({"observe": "pixels"}, "expected one of features, decoded"),
        ({"horizon": 0}, "at least 1 step"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"num_envs": 0}, "at least 1 dream"),
    ],
)
def test_arguments_that_make_no_dream(settings, said):
    with pytest.raises(ValueError, match=said):
        DreamVectorEnv(source("vm"), **{"num_envs": 2, **settings})


def test_misuse_is_told(tmp_path):
    with pytest.raises(ValueError, match="no episodes"):
        DreamVectorEnv(source("vm")._replace(episodes=[]))
    with pytest.raises(ValueError, match=r"config\.yaml"):
        DreamVectorEnv(tmp_path)
    envs = DreamVectorEnv(source("vm"), 2)
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(np.array([1, 1]))
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="2 members of Discrete"):
        envs.step(np.array([1, 1, 1]))
    with pytest.raises(ValueError, match="members of Discrete"):
        envs.step(np.array([0, 1]))
    boxed = DreamVectorEnv(source("vm", BOX), 1)
    boxed.reset(seed=0)
    with pytest.raises(ValueError, match="members of Box"):
        boxed.step(np.full((1, 2), np.nan))
    one = DreamEnv(source("vm", cont=-50.0))
    one.reset(seed=0)
    assert one.step(1)[2]
    with pytest.raises(gym.error.ResetNeeded):
        one.step(1)


class Square(gym.Env):
    """A bright square that walks over a dark image; ends at the edges."""

    observation_space = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = 6
        return self._draw(), {}

    def step(self, action):
        self.x += 1 if self.np_random.random() < 0.5 else -1
        return self._draw(), 1.0, not 0 < self.x < 12, False, {}

    def _draw(self):
        image = np.full((16, 16, 3), 20, np.uint8)
        image[6:10, self.x : self.x + 4] = 250
        return image


@pytest.fixture(scope="module")
def dreamer(tmp_path_factory):
    """A finished Dreamer run on images."""
    out = tmp_path_factory.mktemp("runs") / "dreamer"
    out.mkdir()
    small = [
        f"env={{id: '{__name__}:Square', time_limit: 30}}",
        "collect.envs=2",
        "rssm={size: nano, deter: 16, stoch: 4, classes: 4, units: 16, hidden: 16, depth: 2, bins: 21}",
        "dreamer={batch: 2, sequence: 8, threads: 1, actor_layers: 1, horizon: 3}",
        "online={steps: 120, prefill: 60, train_ratio: 2, evaluate_every: 0}",
        "target.real_return=null",
        "evaluate.episodes=1",
    ]
    config = configs.load("dreamer-cartpole", small)
    configs.save(config, out / "config.yaml")
    with RunLog(out, False, False) as log, LocalOnline(config, out) as executor:
        train(config, out, executor, log)
    return out


@pytest.mark.parametrize("starts", ["first", "any"])
def test_a_dreamer_run_can_be_dreamt(dreamer, starts):
    made = DreamSource.of(dreamer)
    assert made.horizon == 30 and made.temperature == 1.0 and len(made.episodes) > 2
    assert not any(parameter.requires_grad for parameter in made.model.parameters())
    envs = gym.make_vec("raywm/Dream-v0", num_envs=3, run=str(dreamer), starts=starts)
    assert envs.single_observation_space.shape == (16 + 16,)
    assert equal(play(envs, 10, 0), play(DreamVectorEnv(made, 3, starts=starts), 10, 0))
    seen = DreamVectorEnv(made, 2, observe="decoded", starts=starts)
    assert seen.single_observation_space == Square.observation_space
    assert seen.reset(seed=0)[0].dtype == np.uint8
    one = gym.make("raywm/Dream-v0", run=str(dreamer), starts=starts)
    assert one.reset(seed=0)[0] in one.observation_space
    one.step(1)


def test_a_run_that_goes_on_changes_no_dream(dreamer, tmp_path):
    """What an environment holds is its own; what the directory holds later, or loses, is not looked at again."""
    copy = tmp_path / "copy"
    shutil.copytree(dreamer, copy)
    envs = DreamVectorEnv(copy, 2)
    before = play(envs, 40, 0)
    shutil.rmtree(copy)
    assert equal(before, play(envs, 40, 0))
