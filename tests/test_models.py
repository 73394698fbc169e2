"""Every world model with every learner at toy size, and what a world model promises."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from raywm.controllers import Controller, ControllerAgent, PopulationPolicy
from raywm.data.episode import Episode
from raywm.data.store import Snapshot
from raywm.dream import dream, dream_returns
from raywm.evaluate import encoded_actions
from raywm.fit import Trainer
from raywm.learners.cmaes import CMAES
from raywm.learners.reinforce import Reinforce
from raywm.models import build_model
from raywm.models.base import repeat
from raywm.spaces import ActionCodec

VECTOR = {"vector": ((3,), False)}
IMAGE = {"image": ((64, 64, 3), True)}
BOTH = {"image": ((64, 64, 3), True), "vector": ((2,), False)}
SIZES = {"hidden": 16, "latent": 4, "mixtures": 2, "head_hidden": 8}
MODELS = {
    "identity": (VECTOR, {"vision": "identity"}),
    "values": (VECTOR, {"vision": "identity", "residual": False, "joint": False, "features": "zhc"}),
    "mlp": (VECTOR, {"vision": "mlp"}),
    "conv": (IMAGE, {"vision": "conv"}),
    "mixed": (BOTH, {"vision": "auto"}),
}
SPACES = {
    "discrete": spaces.Discrete(3, start=-1),
    "box": spaces.Box(-2.0, 4.0, (2,)),
    "multi": spaces.MultiDiscrete([2, 3]),
    "binary": spaces.MultiBinary(2),
}


def make_episode(columns, codec, rows, seed, terminal=True):
    rng = np.random.default_rng(seed)
    obs = {}
    for name, (shape, image) in columns.items():
        obs[name] = (
            rng.integers(0, 256, (rows, *shape), dtype=np.uint8)
            if image
            else rng.normal(size=(rows, *shape)).astype(np.float32)
        )
    action = np.stack([codec.sample(rng) for _ in range(rows)])
    action[0] = codec.zero()
    reward = rng.normal(size=rows).astype(np.float32)
    reward[0] = 0
    first, last, end = np.zeros((3, rows), bool)
    first[0], last[-1], end[-1] = True, True, terminal
    return Episode(f"e{seed:03d}", obs, action, reward, first, last, end, {})


def build(name, space="discrete", **sizes):
    columns, options = MODELS[name]
    codec = ActionCodec(SPACES[space])
    torch.manual_seed(0)
    return build_model("vm", columns, codec.dim, **{**SIZES, **options, **sizes}), codec, columns


@pytest.mark.parametrize("name", MODELS)
def test_folding_the_posterior_over_an_episode_finds_the_states_that_loss_used(name):
    model, codec, columns = build(name)
    episode = make_episode(columns, codec, 9, 1)
    snapshot = Snapshot([episode], codec)
    batch = snapshot.sample(1, 9, np.random.default_rng(0))
    draws = torch.randn(1, 9, model.latent)
    fit = model.loss(batch, "memory", {"z": draws})
    state, action = model.initial(1), torch.from_numpy(encoded_actions(episode, codec))
    for t in range(9):
        obs = {k: torch.from_numpy(v[t : t + 1]) for k, v in episode.obs.items()}
        noise = {"z": draws[:, t], "pick": torch.zeros(1, 1)}
        state = model.posterior(state, action[t : t + 1], obs, torch.tensor([t == 0]), noise)
        for leaf, value in state.items():
            torch.testing.assert_close(value[0], fit.states[leaf][t], atol=1e-5, rtol=1e-4)
        assert t or not state["h"].any()
    assert fit.valid.tolist() == [True] * 8 + [False]


def test_a_state_means_the_same_alone_and_beside_others():
    model, codec, columns = build("identity")
    state = repeat(model.initial(1), 3)
    noise = model.noise(3, torch.Generator().manual_seed(0))
    obs = {"vector": torch.randn(3, 3)}
    all_rows = model.posterior(state, torch.zeros(3, 3), obs, torch.tensor([True, False, False]), noise)
    one = model.posterior(
        model.initial(1), torch.zeros(1, 3), {"vector": obs["vector"][1:2]}, torch.tensor([False]),
        {k: v[1:2] for k, v in noise.items()},
    )  # fmt: skip
    for leaf in one:
        torch.testing.assert_close(all_rows[leaf][1:2], one[leaf])


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", MODELS)
def test_every_learner_dreams_in_every_model(name, space):
    model, codec, columns = build(name, space)
    controller = Controller(model.feat_dim, codec.dim)
    rng = torch.Generator().manual_seed(0)
    start = model.initial(4)
    es = CMAES(controller.start(), 0.5, 6, seed=0)
    before = es.mean.copy()
    policy = PopulationPolicy(controller, codec, torch.tensor(es.ask(), dtype=torch.float32))
    returns, lengths = dream_returns(model, policy, start, 5, rng, candidates=6)
    assert returns.shape == lengths.shape == (24,) and torch.isfinite(returns).all()
    es.tell(returns.view(6, 4).mean(1).numpy())
    assert (es.mean != before).any()
    learner = Reinforce(controller, codec, repeats=4)
    metrics = learner.update(model, start, 5, rng)
    assert np.isfinite(metrics["return_mean"]) and learner.theta.any()
    imagined = dream(model, lambda f, t: torch.zeros(4, codec.dim), start, 5, rng)
    assert imagined.features.shape == (6, 4, model.feat_dim) and imagined.reward.shape == (5, 4)
    imagined.reward.sum().backward()
    assert model.memory.lstm.weight_hh_l0.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["mlp", "conv", "mixed"])
def test_a_fit_of_every_phase_learns_and_encodes_once(name):
    model, codec, columns = build(name)
    snapshot = Snapshot([make_episode(columns, codec, 12, s) for s in range(4)], codec)
    calls = []
    encode = model.encode
    model.encode = lambda obs: calls.append(len(next(iter(obs.values())))) or encode(obs)
    trainer = Trainer(model, 0, vision_steps=4, vision_batch=8, memory_steps=4, batch=4, sequence=8, evaluate_every=2)
    rows = trainer.fit(snapshot, 0)
    assert sum(calls) == snapshot.rows  # every frame once, however many steps
    assert {r["phase"] for r in rows} == {"vision", "memory"} and all(np.isfinite(r["loss"]) for r in rows)
    restored = Trainer(build(name)[0], 0)
    restored.load_optimisers(trainer.optimiser_tensors())
    for phase, optimiser in restored.optimisers.items():
        for a, b in zip(
            optimiser.state_dict()["state"].values(), trainer.optimisers[phase].state_dict()["state"].values()
        ):
            assert all(torch.equal(a[k], b[k]) for k in a)


def test_temperature_divides_the_logits_and_scales_sigma():
    model, codec, _ = build("identity")
    memory = model.memory
    out = torch.zeros(1, sum(memory.head_sizes))
    out[0, :2] = torch.tensor([0.0, 2.0])  # weights 0.12, 0.88; at temperature 4 they are 0.38, 0.62
    out[0, 2:8] = torch.tensor([-10.0, 10.0] * 3)
    noise = {"pick": torch.tensor([[0.2]]), "z": torch.ones(1, 3)}
    assert torch.allclose(memory.sample(out, noise, 1.0), torch.full((1, 3), 11.0))
    assert torch.allclose(memory.sample(out, noise, 4.0), torch.full((1, 3), -8.0))


def test_mixture_log_probability_against_torch_distributions():
    for joint in (True, False):
        model, _, _ = build("identity", joint=joint)
        memory = model.memory
        out, target = torch.randn(5, sum(memory.head_sizes)), torch.randn(5, 3)
        logits, mean, logstd = memory.split(out)
        d = torch.distributions
        if joint:
            parts = d.Independent(d.Normal(mean.transpose(1, 2), logstd.exp().transpose(1, 2)), 1)
            expected = d.MixtureSameFamily(d.Categorical(logits=logits.squeeze(1)), parts).log_prob(target)
        else:
            parts = d.Normal(mean, logstd.exp())
            expected = d.MixtureSameFamily(d.Categorical(logits=logits), parts).log_prob(target).sum(-1)
        torch.testing.assert_close(memory.log_prob(out, target), expected)


def test_memory_does_not_reshape_vision():
    model, codec, columns = build("mlp")
    batch = Snapshot([make_episode(columns, codec, 9, s) for s in range(2)], codec).sample(
        2, 9, np.random.default_rng(0)
    )
    model.loss(batch, "memory").loss.mean().backward()
    assert all(p.grad is None for p in model.vision.parameters())
    assert all(p.grad is not None for p in model.memory.parameters())


def test_cmaes_is_rebuilt_from_its_fitnesses_with_its_covariance():
    def fitness(x):
        return -((x - np.arange(5)) ** 2 * [1, 10, 100, 1, 1]).sum(1)

    for separable in (False, True):
        one = CMAES(np.zeros(5), 0.5, 8, seed=3, separable=separable)
        for _ in range(30):
            one.tell(fitness(one.ask()))
        two = CMAES(np.zeros(5), 0.5, 8, seed=3, separable=separable)
        two.replay(np.stack(one.history))
        assert (one.ask() == two.ask()).all() and (one.mean == two.mean).all() and one.sigma == two.sigma
    with pytest.raises(ValueError, match="finite"):
        one.tell(np.full(8, np.nan))


def test_an_agent_follows_its_observations_and_restarts_rows_on_first():
    model, codec, _ = build("identity")
    controller = Controller(model.feat_dim, codec.dim)
    theta = np.random.default_rng(0).normal(size=controller.size)
    agent = ControllerAgent(model, controller, codec, theta)
    rng = np.random.default_rng(1)
    seen = rng.normal(size=(6, 2, 3)).astype(np.float32)
    state, alone = agent.initial(2), agent.initial(2)
    for t in range(6):
        first = np.array([t == 0, t in (0, 3)])
        action, state = agent.act({"vector": seen[t]}, state, first, [rng] * 2)
        assert all(codec.space.contains(a) for a in action)
        if t >= 3:  # row 1 began again at t = 3: what was before must not matter
            other, alone = agent.act({"vector": seen[t]}, alone, np.array([t == 3] * 2), [rng] * 2)
            assert torch.allclose(alone["h"][1], state["h"][1])
    with pytest.raises(ValueError, match="expected"):
        agent.theta = np.zeros(3)


def test_images_of_other_sizes_say_what_to_do():
    with pytest.raises(ValueError, match="resize"):
        build_model("vm", {"image": ((84, 84, 3), True)}, 2)
    for size in (64, 96):
        model = build_model("vm", {"image": ((size, size, 3), True)}, 2, **SIZES)
        assert model.decode(model.initial(2))["image"].shape == (2, size, size, 3)
