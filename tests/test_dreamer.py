"""The Dreamer learner and the RSSM against closed forms, and what their gradients may reach."""

from __future__ import annotations

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_replay import Memory

from raywm import config as configs
from raywm.agent import Agent
from raywm.data.batch import Batch, blank
from raywm.data.episode import Episode
from raywm.data.replay import Replay
from raywm.dream import dream
from raywm.envs.classic import MemoryEnv
from raywm.fit import BF16_WEIGHTS, has_fast_bf16
from raywm.learners.actor import Actor
from raywm.learners.dreamer import DreamerLearner, Percentiles, lambda_return, rows, split
from raywm.learners.dreamer_agent import DreamerAgent
from raywm.learners.optim import Optimiser
from raywm.loops.parts import dreamer_specification
from raywm.models.codecs import stages
from raywm.models.heads import (
    Picked,
    StraightThrough,
    TwoHot,
    categorical_kl,
    columns,
    draw,
    gaussian_kl,
    mixed_probs,
    symexp,
    symlog,
)
from raywm.models.rssm import RSSM, SIZES, gated
from raywm.models.scan import ScanLinear, scanning
from raywm.spaces import ActionCodec

SPACES = {
    "discrete": gym.spaces.Discrete(3),
    "box": gym.spaces.Box(-2, 2, (2,), np.float32),
    "multi_discrete": gym.spaces.MultiDiscrete([2, 3]),
    "multi_binary": gym.spaces.MultiBinary(2),
}
VECTOR = {"vector": gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)}
MIXED = {"image": gym.spaces.Box(0, 255, (16, 16, 3), np.uint8), **VECTOR}


def make(action="discrete", columns=VECTOR, B=4, T=6, seed=0, rank=0, ranks=1, device="cpu", **settings):
    """A learner and a batch of its context and T rows."""
    codec = ActionCodec(SPACES[action])
    data = {"algorithm": "dreamer", "env": {"id": "none"}, "dreamer": {"precision": "fp32", "horizon": 4}}
    for key, value in settings.items():
        configs.apply_override(data, f"{key.replace('__', '.')}={value}")
    config = configs.parse(data)
    spec = dreamer_specification(config, columns, codec)
    batch = batch_of(columns, codec, B, T + config.dreamer.context, seed)
    return DreamerLearner(spec, 0, device, rank, ranks), batch.to(device)


def batch_of(columns, codec, B, T, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    like = {n: (tuple(c.shape), torch.uint8 if c.dtype == np.uint8 else torch.float32) for n, c in columns.items()}
    batch = blank(B, T, like, codec.dim)
    for column in batch.obs.values():
        shape = tuple(column.shape)
        image = column.dtype == torch.uint8
        column.copy_(torch.from_numpy(rng.integers(0, 256, shape) if image else rng.normal(size=shape)))
    actions = np.stack([codec.sample(rng) for _ in range(B * T)])
    batch.action.copy_(torch.from_numpy(codec.encode(actions)).view(B, T, -1))
    batch.reward.copy_(torch.from_numpy(rng.normal(size=(B, T))))
    for flag in (batch.is_first, batch.is_last, batch.is_terminal):
        flag.zero_()
    batch.mask.fill_(True)
    end = T // 2
    batch.is_last[0, end - 1] = batch.is_terminal[0, end - 1] = batch.is_first[0, end] = True
    batch.is_last[-1, end - 1] = batch.is_first[-1, end] = True  # truncated
    batch.action[batch.is_first] = 0
    return batch


# ------------------------------------------------------------------------------------------------ closed forms


def test_symlog_and_symexp_are_inverse():
    x = torch.tensor([-1e4, -1.0, -1e-3, 0.0, 0.5, 3e3])
    assert torch.allclose(symlog(x), torch.tensor([math.copysign(math.log1p(abs(v)), v) for v in x.tolist()]))
    assert torch.allclose(symexp(symlog(x)), x, rtol=1e-4)


def test_two_hot_says_the_number_it_was_fitted_to():
    twohot = TwoHot(255)
    ordered = twohot.bins.sort().values
    assert ordered[127] == 0 and torch.equal(ordered, -ordered.flip(0)) and len(ordered.unique()) == 255
    target = torch.tensor([-300.0, -1.5, 0.0, 0.3, 7.0, 2500.0])
    logits = torch.zeros(6, 255, requires_grad=True)
    for _ in range(3000):
        (grad,) = torch.autograd.grad(twohot.loss(logits, target).sum(), logits)
        logits = (logits - grad).detach().requires_grad_()
    two = logits.softmax(-1).topk(2).values.sum(-1)
    assert torch.allclose(two, torch.ones(6), atol=0.01)
    assert torch.allclose(twohot.mean(logits), target, rtol=0.05, atol=0.05)
    assert twohot.mean(torch.zeros(255)) == 0  # an untrained critic says exactly nothing
    exact = twohot.mean(logits)
    with torch.autocast("cpu", torch.bfloat16):  # values of an update in bf16 have their digits
        assert torch.equal(twohot.mean(logits), exact) and exact.dtype == torch.float32


def test_two_hot_loss_is_the_cross_entropy_of_the_two_bins():
    twohot, logits = TwoHot(9, limit=2.0), torch.randn(9, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    log_p = logits.log_softmax(-1)
    for a, b in ((2, 3), (6, 7), (0, 5), (0, 1)):  # positive, negative, across 0
        target = twohot.bins[a] * 0.25 + twohot.bins[b] * 0.75
        expected = -(0.25 * log_p[a] + 0.75 * log_p[b])
        assert torch.allclose(twohot.loss(logits, target), expected)
    assert torch.allclose(twohot.loss(logits, target, target), 2 * expected)
    grads = [torch.autograd.grad(x, logits)[0] for x in (3 * twohot.loss(logits, target, target), 6 * expected)]
    assert torch.allclose(*grads, atol=1e-6)
    assert torch.allclose(twohot.loss(log_p, torch.tensor(-1e9)), -log_p[8])  # beyond the last bin


def test_lambda_return_is_its_definition():
    g = torch.Generator().manual_seed(1)
    reward, live, boot = (torch.rand(5, 3, generator=g) for _ in range(3))
    last = boot[-1]
    expected = []
    for t in reversed(range(5)):
        last = reward[t] + live[t] * (0.05 * boot[t] + 0.95 * last)
        expected.insert(0, last)
    assert torch.allclose(lambda_return(reward, live, boot, 0.95), torch.stack(expected))
    # lambda 1: the discounted sum of rewards; lambda 0: one step and the value
    sums = reward[0] + live[0] * (reward[1] + live[1] * (reward[2] + live[2] * (reward[3] + live[3] * reward[4])))
    assert torch.allclose(lambda_return(reward, live, 0 * boot, 1.0)[0], sums)
    assert torch.allclose(lambda_return(reward, live, boot, 0.0), reward + live * boot)


def test_kl_of_both_latents():
    p, q = (torch.rand(7, 2, 5, generator=torch.Generator().manual_seed(s)).softmax(-1) for s in (0, 1))
    D = torch.distributions
    expected = D.kl_divergence(D.Categorical(p), D.Categorical(q)).sum(-1)
    assert torch.allclose(categorical_kl(p, q), expected, atol=1e-6)
    mean_p, mean_q = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(2))
    std_p, std_q = 0.1 + torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(3))
    expected = D.kl_divergence(D.Normal(mean_p, std_p), D.Normal(mean_q, std_q)).sum(-1)
    assert torch.allclose(gaussian_kl(mean_p, std_p, mean_q, std_q), expected, atol=1e-4)


def test_free_nats_stop_both_sides_of_the_kl():
    for free, reached in ((1e6, False), (0.0, True)):
        learner, batch = make(rssm__free_nats=free)
        model = learner.model
        fit = model.loss(rows(batch, slice(1, None)), "model")
        fit.loss.sum().backward()
        prior = [p.grad.abs().sum().item() for p in model.prior_out.parameters()]
        assert (sum(prior) > 0) == reached


def test_percentiles_follow_returns_and_keep_their_floor():
    values = torch.linspace(0, 100, 1001)
    p = Percentiles(0.9)
    for _ in range(200):
        p.update(values)
    assert p.low == pytest.approx(5, abs=0.1) and p.high == pytest.approx(95, abs=0.1)
    assert p.scale == pytest.approx(90, abs=0.2)
    small = Percentiles(0.9)
    small.update(values * 1e-6)
    assert small.scale == 1.0  # tiny returns are not blown up


def test_draw_has_the_chances_it_was_given():
    uniform = (torch.arange(40000) + 0.5) / 40000
    for unimix in (0.0, 0.1):
        logits = torch.tensor([0.0, 2.0, -1.0, 3.0])
        probs = mixed_probs(logits, unimix)
        assert probs.sum() == pytest.approx(1) and probs.min() >= unimix / 4
        samples = draw(logits.expand(40000, 4), uniform, unimix)
        assert torch.equal(samples.sum(-1), torch.ones(40000))
        assert torch.allclose(samples.mean(0), probs, atol=1e-3)
    ends = draw(torch.zeros(2, 7), torch.tensor([0.0, 1 - 2**-24]))  # no gap at either end
    assert torch.equal(ends.argmax(-1), torch.tensor([0, 6]))
    assert draw(torch.tensor([[500.0, -500.0, 499.0]]), torch.tensor([0.3])).sum() == 1


@pytest.mark.parametrize("action", ["discrete", "box"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_dreaming_in_numbers_of_classes_is_dreaming_in_one_hots(action, blocks):
    losses, weights = [], []
    for dense in (False, True):
        learner, batch = make(action, rssm__blocks=blocks)
        assert learner.model.onehots == learner.model.latent.shape
        if dense:
            learner.model.onehots = None
        for _ in range(2):  # the first one moves reward and critic away from 0
            losses.append({k: float(v) for k, v in learner.update(batch).items()})
        weights.append(learner.tensors())
    for a, b in zip(losses[:2], losses[2:]):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], rtol=1e-3, atol=1e-5), name


def test_compact_features_are_features():
    from raywm.models.heads import Head

    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        head = Head(5 + 12, 8, 1, 3, onehots=(3, 4)).to(dtype)
        classes = torch.randint(4, (6, 7, 3))
        deter = torch.randn(6, 7, 5).to(dtype)
        dense = torch.cat([deter, torch.nn.functional.one_hot(classes, 4).flatten(-2).to(dtype)], -1)
        said, grads = [], []
        for features in (dense, torch.cat([deter, classes.to(dtype)], -1)):
            head.zero_grad()
            said.append(head(features))
            said[-1].square().sum().backward()
            grads.append([p.grad.clone() for p in head.parameters()])
        assert torch.allclose(*said, atol=close)
        assert all(torch.allclose(a, b, rtol=close, atol=10 * close) for a, b in zip(*grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_picked_columns_have_the_gradient_of_the_product(dtype, monkeypatch):
    places = columns(torch.randint(1, 4, (50, 3)), 12)  # nobody picks the first of each four
    up = torch.randn(50, 8).to(dtype)
    grads = []
    for least in (0, 10**9):
        monkeypatch.setattr(Picked, "SORTED", least)
        weight = torch.ones(8, 12, dtype=dtype, requires_grad=True)
        Picked.apply(places, weight).backward(up.t().contiguous().t())
        grads.append(weight.grad)
    assert torch.equal(grads[0][:, ::4], torch.zeros(8, 3, dtype=dtype)) and grads[0].abs().sum() > 0
    assert torch.allclose(*grads, rtol=0.02, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_straight_through_has_the_gradients_of_the_probabilities():
    logits = torch.randn(3, 2, 5, requires_grad=True)
    uniform, up = torch.rand(3, 2), torch.randn(3, 2, 5)
    sample = StraightThrough.apply(logits, uniform, 0.1, torch.float32)
    assert torch.equal(sample.sum(-1), torch.ones(3, 2))
    (got,) = torch.autograd.grad((sample * up).sum(), logits)
    (expected,) = torch.autograd.grad((mixed_probs(logits, 0.1) * up).sum(), logits)
    assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(("blocks", "large"), [(1, None), (3, None), (1, torch.bfloat16), (3, torch.bfloat16)])
def test_scan_makes_the_gradients_of_plain_autograd(blocks, large, monkeypatch):
    monkeypatch.setattr("raywm.models.scan.LARGE", 0)
    layer = ScanLinear(6, 6, blocks, bias=True)
    steps = torch.randn(5, 4, 6)

    def run():
        state = torch.zeros(4, 6)
        for x in steps:
            state = layer(state + x).tanh()
        return state.square().sum()

    expected = torch.autograd.grad(run(), list(layer.parameters()))
    with scanning(layer, torch.float32, large):
        assert layer(steps[0]).dtype == torch.float32
    with scanning(layer, torch.float32, large):
        loss = run()
    for got, wanted in zip(torch.autograd.grad(loss, list(layer.parameters())), expected):
        assert torch.allclose(got, wanted, atol=0.1 if large else 1e-6, rtol=0.05)
        assert not large or not torch.allclose(got, wanted, atol=1e-6, rtol=1e-6)  # it did multiply in bf16


# ------------------------------------------------------------------------------------------------ the model


def test_update_gates_forget_within_the_timescale():
    flat = torch.zeros(8, 64 * 3)
    for blocks in (1, 4):
        learner, _ = make(rssm__deter=64, rssm__blocks=blocks, rssm__timescale=65)
        bias = learner.model.core.update_bias.view(blocks, -1)
        assert torch.allclose(bias[:, 0], torch.tensor(-1.0)) and torch.allclose(bias[:, -1], -torch.tensor(64.0).log())
        kept = gated(torch.ones(8, 64), flat, learner.model.core.update_bias)  # without inputs
        assert kept.min() == pytest.approx(1 - 1 / (1 + np.e), abs=1e-5)
        assert kept.max() == pytest.approx(1 - 1 / 65, abs=1e-5)
    plain, _ = make(rssm__deter=64)
    assert plain.model.core.update_bias.tolist() == [-1.0]
    with pytest.raises(ValueError, match="timescale"):
        make(rssm__timescale=3)


def test_the_rewards_loss_has_its_weight():
    losses = {}
    for scale in (1, 5):
        learner, batch = make(rssm__reward_scale=scale)
        losses[scale] = {name: float(value) for name, value in learner.update(batch).items()}
    assert losses[5]["reward_loss"] == pytest.approx(5 * losses[1]["reward_loss"], rel=1e-5)
    assert losses[5]["model_loss"] - losses[1]["model_loss"] == pytest.approx(4 * losses[1]["reward_loss"], rel=1e-3)


def test_posterior_folded_over_an_episode_gives_the_states_of_the_loss():
    for latent, blocks in (("categorical", 1), ("gaussian", 1), ("categorical", 4)):
        learner, batch = make(columns=MIXED, rssm__latent=latent, rssm__blocks=blocks, dreamer__context=0)
        model, (B, T) = learner.model, batch.is_first.shape
        noise = {"stoch": model.latent.noise((B, T), torch.Generator().manual_seed(3))}
        fit = model.loss(batch, "model", noise)
        state = model.initial(B)
        for t in range(T):
            obs = {k: v[:, t] for k, v in batch.obs.items()}
            at = {"stoch": noise["stoch"][:, t]}
            state = model.posterior(state, batch.action[:, t], obs, batch.is_first[:, t], at)
            for name, leaf in fit.states.items():
                assert torch.allclose(leaf.view(B, T, -1)[:, t], state[name], atol=1e-5), (name, t)


@pytest.mark.parametrize("latent", ["categorical", "gaussian"])
def test_packed_states_come_back(latent):
    learner, batch = make(rssm__latent=latent)
    learner.update(batch)
    state = learner.states
    packed = learner.model.pack(state)
    again = learner.model.unpack(packed)
    assert torch.allclose(again["deter"], state["deter"], atol=5e-4) and again["deter"].dtype == torch.float32
    if latent == "categorical":
        assert torch.equal(again["stoch"], state["stoch"])
        assert sum(v[0, 0].numpy().nbytes for v in packed.values()) == 128 * 2 + 16
    else:
        assert torch.allclose(again["stoch"], state["stoch"], rtol=1e-3)
    assert {k: v.shape for k, v in learner.latents().items()} == {k: v.flatten(0, 1).shape for k, v in packed.items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sequences_start_from_what_was_written_back(accumulate):
    """One pass over an episode, its windows one after another: each begins where folding from its first row leads."""
    learner, _ = make(dreamer__accumulate=accumulate)
    learner.model.noise = lambda batch, rng: learner.model.zero_noise(batch)
    learner.optimiser.move = lambda: torch.zeros(())  # the weights stay
    codec = ActionCodec(SPACES["discrete"])
    rng, rows_ = np.random.default_rng(3), np.arange(41)
    episodes = [
        Episode(
            id=f"e-{n}",
            obs={"vector": rng.normal(size=(41, 4)).astype(np.float32)},
            action=np.where(rows_ > 0, rng.integers(3, size=41), 0),
            reward=np.zeros(41, np.float32),
            is_first=rows_ == 0,
            is_last=rows_ == 40,
            is_terminal=rows_ == 41,
            info={},
        )
        for n in range(2)
    ]
    at = 0

    def draw_at(side, n, T, rng):  # both episodes, from row `at` on
        return np.arange(2), np.full(2, at), None

    truth, state = [], learner.model.initial(2)
    replay = Replay(Memory(episodes), codec, cross=True, context=1)
    replay._rows = draw_at
    whole = replay.sample(2, 41, rng)
    with torch.no_grad():
        for t in range(41):
            obs, first = {"vector": whole.obs["vector"][:, t]}, whole.is_first[:, t]
            state = learner.model.posterior(state, whole.action[:, t], obs, first, learner.model.zero_noise(2))
            truth.append(state)
    began, loss = [], learner.model.loss

    def seen(batch, *args, **kwargs):
        began.append(batch.start)
        return loss(batch, *args, **kwargs)

    learner.model.loss = seen
    for write in (True, False):
        replay = Replay(Memory(episodes), codec, cross=True, context=1)
        replay._rows = draw_at
        for at in range(0, 40, 8):
            began.clear()
            batch = replay.sample(2, 9, rng)
            assert (batch.known is not None and bool(batch.known.all())) == (write and at > 0)
            learner.update(batch)
            start = {k: torch.cat([b[k] for b in began]) for k in state}
            off = {k: (start[k] - v).abs().max().item() for k, v in truth[at].items()}
            if write or at == 0:
                assert off["deter"] < 2e-3 and off["stoch"] == 0, (at, off)
            if write:
                replay.write(batch.rows[:, 1:].reshape(-1), {k: v.numpy() for k, v in learner.latents().items()})
            elif at:
                assert off["deter"] > 0.05  # one row of context from nothing is not enough


def test_first_rows_forget_everything():
    learner, batch = make(dreamer__context=0)
    model, (B, T) = learner.model, batch.is_first.shape
    noise = {"stoch": model.latent.noise((B, T), torch.Generator().manual_seed(3))}
    at = T // 2
    whole = model.loss(batch, "model", noise).states["deter"].view(B, T, -1)[[0, -1], at:]
    tail = rows(batch, slice(at, None))
    cut = model.loss(tail, "model", {"stoch": noise["stoch"][:, at:]}).states["deter"].view(B, T - at, -1)[[0, -1]]
    assert torch.allclose(whole, cut, atol=1e-6)


def test_states_index_repeat_and_concatenate():
    learner, _ = make()
    state = learner.model.initial(3)
    step = learner.model.imagine(state, torch.zeros(3, 3), learner.model.zero_noise(3))
    assert all(v.shape[0] == 3 for v in step.state.values()) and step.reward.shape == step.cont.shape == (3,)
    assert set(learner.model.decode(step.state)) == {"vector"}


def test_sizes_have_about_the_parameters_of_their_names():
    with torch.device("meta"):
        for name in ("1M", "12M", "25M", "50M", "100M", "200M"):
            learner_columns = {"image": ((64, 64, 3), True)}
            model = RSSM(learner_columns, 6, name)
            units = SIZES[name]["units"]
            heads = 2 * (model.feat_dim * units + 2 * units**2) + 255 * units
            count = sum(p.numel() for p in model.parameters()) + heads
            assert 0.5 < count / (float(name[:-1]) * 1e6) < 1.3, (name, count)


def test_images_that_do_not_halve_well_are_refused():
    assert stages("image", (64, 64, 3)) == stages("image", (96, 64, 1)) == 4 and stages("image", (16, 16, 3)) == 2
    with pytest.raises(ValueError, match=r"84x84.*halved 4 times.*env.resize"):
        stages("image", (84, 84, 3))
    with pytest.raises(ValueError, match="4x4"):
        stages("image", (4, 4, 3))


# ------------------------------------------------------------------------------------------------ gradients


def grads_of(learner, loss, retain=True):
    learner.optimiser.zero()
    loss.backward(retain_graph=retain)
    return {
        n: float(sum(p.grad.abs().sum() for p in m.parameters() if p.grad is not None))
        for n, m in learner._modules().items()
    }


@pytest.mark.parametrize("action", sorted(SPACES))
def test_what_the_losses_may_reach(action):
    learner, batch = make(action)
    batch = rows(batch, slice(1, None))
    B, T = batch.is_first.shape
    rng = torch.Generator().manual_seed(0)
    from raywm.learners.dreamer import Shared

    model = Shared(learner.model, (0, 1))
    noise = {k: v.unflatten(0, (B, T)) for k, v in model.noise(B * T, rng).items()}
    fit = learner.model.loss(batch, "model", noise)
    reached = grads_of(learner, fit.loss.sum())
    assert reached["model"] > 0 and reached["actor"] == reached["critic"] == reached["slow_critic"] == 0
    for p in learner.critic.out.parameters():
        torch.nn.init.normal_(p)  # at its zeros there is no advantage
    losses, _ = learner._dreamt({k: v.detach() for k, v in fit.states.items()}, fit.valid, model, rng)
    reached = grads_of(learner, losses.actor.sum())
    assert reached["actor"] > 0 and reached["model"] == reached["critic"] == 0
    reached = grads_of(learner, losses.critic.sum())
    assert reached["critic"] > 0 and reached["model"] == reached["actor"] == 0 == reached["slow_critic"]
    features = learner.model.features(fit.states).unflatten(0, (B, T))
    reached = grads_of(learner, learner._replayed(batch, features, losses.returns[0].view(B, T)))
    assert reached["critic"] > 0 and reached["model"] > 0 and reached["actor"] == 0  # the paper's choice
    assert not losses.returns.requires_grad


def test_terminal_starts_do_not_train_the_actor():
    learner, batch = make(B=1)
    batch.is_terminal.fill_(True)
    metrics = learner.update(batch)
    assert metrics["actor_loss"] == 0 and metrics["critic_loss"] == 0


def test_dreams_start_from_the_last_rows(monkeypatch):
    """Or from all of them; the model and what is written back are the same."""
    every, batch = make(T=6)
    batch.is_terminal[1, -2] = batch.is_last[1, -2] = batch.is_first[1, -1] = True
    told = every.update(batch)
    some, _ = make(T=6, dreamer__dream_last=3)
    starts, critic = [], []
    dreamt, replayed = some._dreamt, some._replayed
    monkeypatch.setattr(some, "_dreamt", lambda *a: starts.append(a[:2]) or dreamt(*a))
    monkeypatch.setattr(some, "_replayed", lambda *a: critic.append(a) or replayed(*a))
    said = some.update(batch)
    for name in ("model_loss", "kl", "vector_loss", "reward_loss"):
        assert said[name] == told[name]
    assert said["critic_loss"] != told["critic_loss"]
    for name, value in some.states.items():
        assert value.shape[:2] == (4, 6) and torch.equal(value, every.states[name])
        assert torch.equal(starts[0][0][name], value[:, 3:].flatten(0, 1))
    context = some.config["context"]
    assert torch.equal(starts[0][1].view(4, 3), ~batch.is_terminal[:, context + 3 :])
    (part, features, boot), features_of = critic[0], some.model.features
    assert torch.equal(part.reward, batch.reward[:, context + 3 :]) and boot.shape == (4, 3)
    assert torch.equal(features, features_of({k: v[:, 3:] for k, v in some.states.items()}))

    for enough in (6, 100):
        same, _ = make(T=6, dreamer__dream_last=enough)
        same.update(batch)
        assert torch.equal(same.optimiser.flat, every.optimiser.flat)
    with pytest.raises(ValueError, match=r"dreamer.dream_last: got 1, expected 0 .* at least 2"):
        make(dreamer__dream_last=1)


def test_dynamics_gradients_reach_the_actor_alone():
    learner, batch = make("box", dreamer__actor_grad="dynamics", rssm__latent="gaussian", dreamer__warmup=0)
    before = copy.deepcopy(learner.actor.state_dict())
    metrics = learner.update(batch)
    assert any(not torch.equal(v, before[k]) for k, v in learner.actor.state_dict().items())
    assert all(torch.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize(
    "head", ["image", "reward", *(pytest.param(h, marks=pytest.mark.slow) for h in ("vector", "cont", "kl"))]
)
def test_one_batch_is_overfitted_by_every_head(head):
    learner, batch = make(columns=MIXED, dreamer__lr=3e-3, dreamer__warmup=20, rssm__free_nats=0.1)
    first, last = None, None
    for _ in range(250):
        last = learner.update(batch)
        first = first or last
    name = {"kl": "kl"}.get(head, f"{head}_loss")
    floor = {"vector": 0.15, "image": 0.6, "reward": 0.35, "cont": 0.1, "kl": 1.0}[head]
    assert last[name] < floor * first[name], (name, float(first[name]), float(last[name]))


# ------------------------------------------------------------------------------------------------ the same, otherwise


def test_standardised_features():
    """By the running moments of what was observed; parts of a batch and dreams in bf16 see the same."""
    learner, batch = make(rssm__standardise="true", dreamer__context=0)
    model = learner.model
    state = {"deter": torch.randn(5, 128) * 0.3 + 0.5, "stoch": torch.randn(5, model.latent.size)}
    plain = torch.cat([state["deter"], state["stoch"]], -1)
    assert torch.allclose(model.features(state), plain, atol=1e-4)  # until something was seen
    learner.update(batch)
    seen = learner.states["deter"].flatten(0, 1)
    expected = torch.stack(
        [torch.zeros(128).lerp(seen.mean(0), 0.01), torch.ones(128).lerp(seen.square().mean(0), 0.01)]
    )
    assert torch.allclose(model.moments, expected, atol=1e-6)
    for _ in range(2000):
        model.follow(model.moments_of(learner.states))
    features = model.features({k: v.flatten(0, 1) for k, v in learner.states.items()})[:, :128]
    std = seen.std(0, correction=0)
    assert torch.allclose(features.mean(0), torch.zeros(128), atol=1e-3)
    assert torch.allclose(features.std(0, correction=0), std / (std**2 + 1e-4).sqrt(), atol=0.02)

    parts, _ = make(rssm__standardise="true", dreamer__context=0, dreamer__accumulate=2)
    parts.update(batch)
    assert torch.allclose(parts.model.moments, expected, atol=1e-6)
    assert "model.moments" in parts.tensors() and "model.moments" in parts.policy()
    fast, exact = model.dreamer("bf16"), model.features(state)
    assert fast.moments is model.moments
    rough = fast.features({k: v.bfloat16() for k, v in state.items()})
    assert rough.dtype == torch.bfloat16 and torch.cosine_similarity(rough.float(), exact, -1).min() > 0.99
    compact = model.compact()
    one_hots = model.latent.unpack(torch.randint(8, (5, 16)))
    start = compact.begin({"deter": state["deter"], "stoch": one_hots})
    assert torch.equal(compact.features(start)[:, :128], exact[:, :128])


@pytest.mark.parametrize("compact", [False, True])
def test_bf16_dreams_keep_what_slow_units_sum_up(compact):
    """Small differences of deter, and steps smaller than what bf16 tells apart, are in a bf16 dream's features."""
    learner, _ = make(rssm__standardise="true", rssm__timescale=500)
    model, rng = learner.model, torch.Generator().manual_seed(0)
    one_hots = model.latent.unpack(torch.randint(8, (256, 16), generator=rng))
    start = {"deter": 0.43 + 0.01 * torch.randn(256, 128, generator=rng), "stoch": one_hots}
    model.moments.copy_(model.moments_of(start))
    action, noise = torch.eye(model.act_dim)[torch.randint(model.act_dim, (256,))], model.noise(256, rng)
    exact, fast = model, model.dreamer("bf16")
    if compact:
        exact, fast = exact.compact(), fast.compact()
        start = exact.begin(start)
    rough = fast.features(start)
    assert rough.dtype == torch.bfloat16
    assert torch.allclose(rough[:, :128].float(), exact.features(start)[:, :128], atol=0.02)
    after = [m.advance(start, action, noise)[0]["deter"] for m in (exact, fast)]
    a, b = [
        (deter - start["deter"])[:, -8:] for deter in after
    ]  # of the slowest units: steps of 0.001, half of what bf16 tells apart
    assert torch.cosine_similarity(a, b).min() > 0.99


def test_a_bf16_learner_s_dreams_keep_it_too(monkeypatch):
    seen = []

    def spy(model, policy, start, *args, **kwargs):
        seen.append(start["deter"].dtype)
        return dream(model, policy, start, *args, **kwargs)

    monkeypatch.setattr("raywm.learners.dreamer.dream", spy)
    learner, batch = make(dreamer__precision="bf16")
    learner.update(batch)
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    ("has", "weights", "fast"),
    [
        ((), 10**7, False),
        (("avx512_bf16",), BF16_WEIGHTS - 1, False),
        (("avx512_bf16",), BF16_WEIGHTS, True),
        (("avx512_bf16", "amx_tile"), 1, True),
    ],
)
def test_bf16_is_for_machines_and_models_that_gain_by_it(has, weights, fast, monkeypatch):
    for what in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{what}_supported", lambda what=what: what in has, raising=False)
    assert has_fast_bf16("cpu", weights) == fast


@pytest.mark.parametrize("last", [0, 3])
def test_accumulated_parts_make_the_same_gradient(last):
    shared = {"dreamer__context": 0, "dreamer__optimiser": "adam", "dreamer__dream_last": last}
    whole, batch = make(**shared)
    parts, _ = make(**shared, dreamer__accumulate=2)
    for learner in (whole, parts):
        learner.percentiles.update(torch.tensor([0.0, 1.0]))
        learner.update(batch)
    assert torch.allclose(whole.optimiser.grad, parts.optimiser.grad, atol=1e-5)
    with pytest.raises(ValueError, match=r"accumulate=3.*4 sequences"):
        split(batch, 3)


def test_bf16_agrees_with_fp32():
    exact, batch = make(columns=MIXED, B=8, T=16, dreamer__optimiser="adam")
    fast, _ = make(columns=MIXED, B=8, T=16, dreamer__optimiser="adam", dreamer__precision="bf16")
    a, b = exact.update(batch), fast.update(batch)
    for name in ("vector_loss", "image_loss", "reward_loss", "cont_loss", "kl", "entropy", "critic_loss"):
        assert torch.allclose(a[name], b[name], rtol=0.05, atol=0.02), name
    cosine = torch.cosine_similarity(exact.optimiser.grad, fast.optimiser.grad, dim=0)
    assert cosine > 0.98


def test_a_learner_goes_on_from_its_tensors():
    learner, batch = make()
    learner.update(batch)
    other, _ = make()
    other.load(learner.tensors())
    a, b = learner.update(batch), other.update(batch)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(learner.optimiser.flat, other.optimiser.flat) and other.updates == 2
    small, _ = make(rssm__deter=64)
    with pytest.raises(ValueError, match="do not fit"):
        small.load(learner.tensors())


@pytest.mark.parametrize("action", sorted(SPACES))
def test_agent_acts_by_its_rows_alone(action):
    learner, _ = make(action)
    agent: Agent = DreamerAgent(make_spec(action), learner.policy(), version=7)
    import pickle

    agent = pickle.loads(pickle.dumps(agent))
    assert agent.version == 7
    codec = ActionCodec(SPACES[action])

    def play(rows, order):
        state, taken = agent.initial(rows), []
        rngs = [np.random.default_rng(order[r]) for r in range(rows)]
        for t in range(3):
            obs = {"vector": np.stack([np.full(4, order[r] + t, np.float32) for r in range(rows)])}
            action, state = agent.act(obs, state, np.full(rows, t == 0), rngs)
            assert all(codec.space.contains(a) for a in action)
            taken.append(action)
        return np.stack(taken, 1)

    three = play(3, [5, 6, 7])
    assert np.allclose(three[[2, 0, 1]], play(3, [7, 5, 6]), atol=1e-5)


def make_spec(action):
    config = configs.parse({"algorithm": "dreamer", "env": {"id": "none"}})
    return dreamer_specification(config, VECTOR, ActionCodec(SPACES[action]))


def test_optimisers_step_as_they_are_written():
    for kind in ("laprop", "adam"):
        layer = torch.nn.Linear(3, 1, bias=False)
        start = layer.weight.detach().clone()
        optimiser = Optimiser([layer], lr=0.1, warmup=0, agc=0.0, kind=kind)
        first = second = torch.zeros(1, 3)
        expected = start.clone()
        for step in range(1, 4):
            grad = torch.tensor([[1.0, -2.0, 0.5]]) * step
            optimiser.zero()
            layer.weight.grad += grad
            optimiser.step()
            second = 0.999 * second + 0.001 * grad**2
            root = (second / (1 - 0.999**step)).sqrt()
            first = 0.9 * first + 0.1 * (grad / root if kind == "laprop" else grad)
            moved = first / (1 - 0.9**step)
            expected = expected - 0.1 * (moved if kind == "laprop" else moved / (root + 1e-8))
        assert torch.allclose(layer.weight, expected, atol=1e-6)


def test_clipping_is_by_tensor():
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0), layer.bias.fill_(0.0)
    optimiser = Optimiser([layer], lr=0.0, agc=0.3, kind="adam")  # laprop leaves its normalised gradient
    optimiser.zero()
    layer.weight.grad += 100.0
    layer.bias.grad += 0.0001
    optimiser.step()
    assert layer.weight.grad.norm() == pytest.approx(0.3 * 2.0)
    assert layer.bias.grad.norm() == pytest.approx(0.0001 * 2**0.5)  # below 0.3 * 1e-3


def test_actor_judges_what_it_samples():
    D = torch.distributions
    actor = Actor(4, 2, "box", (), 16, 1, 0.01)
    features = torch.randn(5, 4)
    noise = torch.randn(5, 2)
    action = actor.sample(features, noise)
    mean, std = actor._normal(actor.net(features))
    log_prob, entropy = actor.judge(features, action)
    normal = D.Independent(D.Normal(mean, std), 1)
    assert torch.allclose(log_prob, normal.log_prob(action), atol=1e-5)
    assert torch.allclose(entropy, normal.entropy(), atol=1e-5)
    actor = Actor(4, 5, "multi_discrete", (2, 3), 16, 1, 0.01)
    action = actor.sample(features, torch.rand(5, 2))
    log_prob, entropy = actor.judge(features, action)
    one, two = (D.Categorical(p) for p in actor._probs(actor.net(features)))
    expected = one.log_prob(action[:, :2].argmax(-1)) + two.log_prob(action[:, 2:].argmax(-1))
    assert torch.allclose(log_prob, expected, atol=1e-5)
    assert torch.allclose(entropy, one.entropy() + two.entropy(), atol=1e-5)


# ------------------------------------------------------------------------------------------------ several learners


def _rank(rank: int, ranks: int, address: str, parts: list[Batch], results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    learner, _ = make(rank=rank, ranks=ranks, dreamer__optimiser="adam", rssm__standardise="true")
    metrics = [learner.update(parts[rank]) for _ in range(3)]
    weights = torch.cat([learner.optimiser.flat, learner.model.moments.flatten()])
    results.put((rank, weights.numpy(), {k: float(v) for k, v in metrics[-1].items()}))
    torch.distributed.destroy_process_group()


def test_two_learners_are_one_on_the_joined_batch(tmp_path):
    single, batch = make(dreamer__optimiser="adam", rssm__standardise="true")
    for _ in range(3):
        metrics = single.update(batch)
    weights = torch.cat([single.optimiser.flat, single.model.moments.flatten()])
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    parts = split(batch, 2)
    address = f"file://{tmp_path}/meet"
    processes = [context.Process(target=_rank, args=(rank, 2, address, parts, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = {rank: (flat, told) for rank, flat, told in (results.get(timeout=120) for _ in processes)}
    for process in processes:
        process.join(30)
    assert np.array_equal(found[0][0], found[1][0])  # the ranks stay together, bit for bit
    assert np.allclose(found[0][0], weights.numpy(), atol=2e-5)
    mean = np.mean([found[r][1]["model_loss"] for r in range(2)])
    assert mean == pytest.approx(float(metrics["model_loss"]), rel=1e-4)


# ------------------------------------------------------------------------------------------------ a known optimum


@pytest.mark.slow
def test_gaussian_rssm_approaches_the_kalman_filter():
    """x' = 0.9 x + 0.5 a + w, y = x + v: no one-step prediction of y is better than the Kalman filter's."""
    A, B, Q, R = 0.9, 0.5, 0.3**2, 0.5**2

    def play(n, T, seed):
        rng = np.random.default_rng(seed)
        x, xs, action = rng.normal(size=n), [], rng.uniform(-1, 1, (n, T)).astype(np.float32)
        action[:, 0] = 0
        for t in range(T):
            x = x if t == 0 else A * x + B * action[:, t] + Q**0.5 * rng.normal(size=n)
            xs.append(x)
        y = np.stack(xs, 1) + R**0.5 * rng.normal(size=(n, T))
        batch = blank(n, T, {"vector": ((1,), torch.float32)}, 1)
        batch.obs["vector"].copy_(torch.from_numpy(y[..., None]))
        batch.action.copy_(torch.from_numpy(action[..., None]))
        for flag in (batch.is_first, batch.is_last, batch.is_terminal, batch.reward):
            flag.zero_()
        batch.is_first[:, 0] = True
        batch.mask.fill_(True)
        return batch, y, action

    def kalman(y, action):
        mean, var, out = np.zeros(len(y)), np.ones(len(y)), []
        for t in range(y.shape[1]):
            if t:
                mean, var = A * mean + B * action[:, t], A * A * var + Q
            out.append(mean)
            gain = var / (var + R)
            mean, var = mean + gain * (y[:, t] - mean), (1 - gain) * var
        return np.stack(out, 1)

    torch.manual_seed(0)
    # a squared error and half the KL are twice the evidence bound of a decoder with variance R = 1/4
    model = RSSM(
        {"vector": ((1,), False)},
        1,
        latent="gaussian",
        symlog=False,
        stoch=4,
        deter=64,
        free_nats=0.0,
        dyn_scale=0.5,
        rep_scale=0.5,
    )
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    steps = 1200
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps) + 1e-5
        batch, _, _ = play(64, 24, step + 1)
        torch.manual_seed(step)
        loss = model.loss(batch, "model").loss.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    batch, y, action = play(2000, 24, 0)
    with torch.no_grad():
        noise = model.latent.central((2000, 24))
        states, _ = model.observe(batch.obs, batch.action, batch.is_first, noise)
        before = {k: v[:, 4:-1].flatten(0, 1) for k, v in states.items()}
        step = model.imagine(before, batch.action[:, 5:].flatten(0, 1), model.zero_noise(2000 * 19))
        predicted = model.decode(step.state)["vector"].view(2000, 19).numpy()
    truth = y[:, 5:]
    got, best, naive = (np.mean((p - truth) ** 2) for p in (predicted, kalman(y, action)[:, 5:], y[:, 4:-1]))
    assert best < 0.75 * naive
    assert got < 1.1 * best, (got, best, naive)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_cue_is_remembered_through_noise():
    """The memory preset's model, fitted to 500 episodes of random play, tells the reward of the others' choices."""
    config = configs.load("dreamer-memory")
    env = MemoryEnv(**config.env.kwargs)
    T = env.steps + 2

    def played(count, seed):
        rng, codec = np.random.default_rng(seed), ActionCodec(env.action_space)
        out = blank(count, T, {"vector": (env.observation_space.shape, torch.float32)}, codec.dim)
        out.mask.fill_(True)
        for flag in (out.is_first, out.is_last, out.is_terminal, out.action, out.reward):
            flag.zero_()
        out.is_first[:, 0] = True
        out.is_last[:, -1] = out.is_terminal[:, -1] = True
        for n in range(count):
            out.obs["vector"][n, 0] = torch.from_numpy(env.reset(seed=int(rng.integers(2**31)))[0])
            for t in range(1, T):
                action = codec.sample(rng)
                obs, out.reward[n, t], *_ = env.step(action)
                out.obs["vector"][n, t] = torch.from_numpy(obs)
                out.action[n, t] = torch.from_numpy(codec.encode(action[None])[0])
        return out

    seen, others = played(500, 0), played(1000, 1)
    torch.manual_seed(0)
    columns = {"vector": (env.observation_space.shape, False)}
    model = RSSM(columns, 2, **dict(config.rssm))
    optimiser = Optimiser([model], config.dreamer.lr, config.dreamer.warmup, config.dreamer.agc)
    rng, right = torch.Generator().manual_seed(0), 0.0
    for update in range(1, 6001):
        some = torch.randint(500, (16,), generator=rng)
        tensors = {name: tensor[some] for name, tensor in seen.tensors().items()}
        obs = {"vector": tensors.pop("obs.vector")}
        optimiser.zero()
        noise = {"stoch": model.latent.noise((16, T), rng)}
        fit = model.loss(Batch(obs=obs, ids=[""] * 16, **tensors), "model", noise)
        fit.loss.mean().backward()
        optimiser.step()
        model.follow(model.moments_of(fit.states))  # as the learner does
        if update % 500 == 0:
            with torch.no_grad():
                noise = model.latent.noise((1000, T), rng)
                states, _ = model.observe(others.obs, others.action, others.is_first, noise)
                told, _ = model.outcomes(model.features(states)[:, -1])
            right = (told.sign() == others.reward[:, -1]).float().mean().item()
            if right > 0.98:
                break
    assert right > 0.98, right  # half of them without a memory


@pytest.mark.parametrize("blocks", [1, 8])
def test_the_size_of_what_comes_in_gets_through_the_norms(blocks):
    """A norm behind a layer without bias sees a single number's sign, and whether a flat patch is light or dark."""
    torch.manual_seed(0)
    columns = {"speed": ((1,), False), "image": ((16, 16, 1), True)}
    model = RSSM(columns, 1, deter=64, stoch=4, classes=4, units=32, hidden=32, blocks=blocks)
    speed, image = torch.zeros(4, 1), torch.full((4, 16, 16, 1), 128, dtype=torch.uint8)
    speed[1], image[3] = 3.0, 255
    speed[0], image[2] = 0.5, 160  # rows 0 and 1, 2 and 3 differ by nothing but size
    obs = {"speed": speed, "image": image}
    with torch.no_grad():
        tokens = model.encoder(obs)
        vector, image = tokens.split([32, tokens.shape[1] - 32], -1)
        assert (vector[0] - vector[1]).abs().max() > 0.1
        assert (image[2] - image[3]).abs().max() > 0.1
        acted = model.core.from_action(torch.tensor([[0.1], [1.0]]))
    assert (acted[0] - acted[1]).abs().max() > 0.1
