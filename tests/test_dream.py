"""Dreams: the packed step against the plain one, and what a population's dreams promise."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from raywm.bench.dream import ROWS, Plain, flop_per_step, step_shapes
from raywm.bench.dream import _model as bench_model
from raywm.controllers import Controller, PopulationPolicy
from raywm.dream import dream, dream_returns
from raywm.learners.fitness import DreamWorker
from raywm.models import build_model
from raywm.models.base import repeat, take
from raywm.spaces import ActionCodec

CODEC = ActionCodec(spaces.Discrete(3))
COLUMNS = {"vector": ((4,), False)}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(end=0.0, **sizes):
    """A random model whose scales are no identity; `end` shifts the ends' log-odds."""
    torch.manual_seed(0)
    sizes = {"hidden": 24, "mixtures": 3, "head_hidden": 16} | sizes
    model = build_model("vm", COLUMNS, CODEC.dim, **sizes).eval()
    with torch.no_grad():
        model.z_low.fill_(-1.5)
        model.z_high.fill_(1.0)
        model.target_mean.copy_(torch.randn(4) * 0.1)
        model.target_scale.copy_(torch.rand(4) * 0.3 + 0.1)
        model.reward_mean.fill_(0.5)
        model.reward_scale.fill_(2.0)
        model.reward_range.copy_(torch.tensor([0.1, 0.9]))
        model.memory.end[-1].bias.add_(end)
    return model


def random_state(model, rows, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=rng) * 0.5 for k, v in model.initial(rows).items()}


def first_observations(rows, seed=0):
    """As a vision encodes them: what dream workers begin at."""
    rng = torch.Generator().manual_seed(seed)
    return {"z_mean": torch.randn(rows, 4, generator=rng), "z_std": torch.rand(rows, 4, generator=rng)}


def population(model, count, seed=0):
    controller = Controller(model.feat_dim, CODEC.dim)
    rng = np.random.default_rng(seed)
    return controller, torch.tensor(rng.normal(size=(count, controller.size)), dtype=torch.float32)


def returns(model, theta, start, horizon=20, seed=1, **options):
    policy = PopulationPolicy(Controller(model.feat_dim, CODEC.dim), CODEC, theta)
    rng = torch.Generator().manual_seed(seed)
    return dream_returns(model, policy, start, horizon, rng, candidates=len(theta), **options)


@pytest.mark.parametrize("rows", [1, 300])  # 300: more than one block of rows
@pytest.mark.parametrize("features", ["zh", "zhc", "z"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("joint", [True, False])
def test_packed_step_is_the_plain_step(joint, residual, features, rows):
    model = build(joint=joint, residual=residual, features=features)
    packed = model.dreamer()
    rng = torch.Generator().manual_seed(0)
    plain_state = packed_state = random_state(model, rows)
    with torch.no_grad():
        for _ in range(4):
            action = torch.eye(3)[torch.randint(3, (rows,), generator=rng)]
            noise = model.noise(rows, rng)
            expected = model.imagine(plain_state, action, noise, 1.3)
            got = packed.imagine(packed_state, action, noise, 1.3)
            plain_state, packed_state = expected.state, got.state
            for name, leaf in plain_state.items():
                torch.testing.assert_close(packed_state[name], leaf, atol=1e-5, rtol=0)
            torch.testing.assert_close(got.reward, expected.reward, atol=1e-5, rtol=0)
            torch.testing.assert_close(got.cont, expected.cont, atol=1e-5, rtol=0)
            torch.testing.assert_close(packed.features(packed_state), model.features(plain_state), atol=1e-5, rtol=0)
    assert model.features(plain_state).shape == (rows, model.feat_dim)


def test_packed_states_are_values():
    """A step changes neither the state it was given nor one returned before, and rows may be taken from a state."""
    model = build()
    packed = model.dreamer()
    rng = torch.Generator().manual_seed(0)
    noise, action = model.noise(6, rng), torch.eye(3)[[0, 1, 2, 0, 1, 2]]
    with torch.no_grad():
        first = packed.imagine(random_state(model, 6), action, noise)
        kept = {k: v.clone() for k, v in first.state.items()}
        second = packed.imagine(first.state, action, noise)
        again = packed.imagine(first.state, action, noise)
        part = packed.imagine(take(first.state, torch.tensor([4, 2])), action[[4, 2]], take(noise, [4, 2]))
    for name, leaf in kept.items():
        assert torch.equal(first.state[name], leaf)
        assert torch.equal(second.state[name], again.state[name])
        torch.testing.assert_close(part.state[name], second.state[name][[4, 2]], atol=1e-6, rtol=0)


def test_bf16_is_close_beside_the_models_own_uncertainty():
    """What bf16 changes in one step is a small part of the spread that the model itself gives its prediction."""
    model = build(latent=4, hidden=64, head_hidden=64)
    packed = model.dreamer("bf16")
    rng = torch.Generator().manual_seed(0)
    state = random_state(model, 2000)
    action, noise = torch.eye(3)[torch.randint(3, (2000,), generator=rng)], model.noise(2000, rng)
    noise["pick"].fill_(1e-6)  # one and the same component: a draw at a border may fall to either side
    with torch.no_grad():
        exact, other = model.imagine(state, action, noise), model.imagine(state, action, noise | {"z": -noise["z"]})
        near = packed.imagine(state, action, noise)
    spread = (exact.state["z"] - other.state["z"]).square().mean().sqrt() / 2  # sigma, for z of unit variance
    error = (near.state["z"] - exact.state["z"]).square().mean().sqrt()
    assert 0 < error < 0.01 * spread
    assert (near.cont - exact.cont).abs().max() < 0.01
    assert (near.reward - exact.reward).abs().max() < 0.02 * model.reward_scale


def test_unknown_precision():
    with pytest.raises(ValueError, match=r"got dream.precision='fp8', expected one of \['bf16', 'fp32'\]"):
        build().dreamer("fp8")


def test_dream_and_dream_returns_agree():
    """The same policy and seed, no ends drawn: the weighted sum of what `dream` kept is what `dream_returns` added."""
    model = build()
    _, theta = population(model, 1)
    policy = PopulationPolicy(Controller(model.feat_dim, CODEC.dim), CODEC, theta)
    start = random_state(model, 7)
    with torch.no_grad():
        kept = dream(model, policy, start, 12, torch.Generator().manual_seed(3))
    arriving = torch.cat([torch.ones(1, 7), kept.cont.cumprod(0)[:-1]])
    total, length = returns(model, theta, start, 12, 3, sampled_ends=False)
    torch.testing.assert_close(total, (arriving * kept.reward).sum(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(length, arriving.sum(0), atol=1e-4, rtol=0)


def test_stopping_when_none_lives_changes_nothing():
    """Ends come fast; one long-lived row prevents the early stop and leaves the other rows' returns as they were."""
    model = build(end=4.0).dreamer()
    _, theta = population(model, 3)
    start = random_state(model.model, 5)

    class Awake:
        """The same model, but its last row never ends."""

        noise, features = model.noise, model.features

        def imagine(self, *args):
            step = model.imagine(*args)
            cont = step.cont.clone()
            cont[-1] = 2.0
            return step._replace(cont=cont)

    policy = PopulationPolicy(Controller(model.feat_dim, CODEC.dim), CODEC, theta)
    calls = []

    def counting(features, t):
        calls.append(t)
        return policy(features, t)

    run = lambda m: dream_returns(m, counting, start, 200, torch.Generator().manual_seed(0), candidates=3)  # noqa: E731
    total, length = run(model)
    assert max(calls) < 100  # it did stop
    calls.clear()
    total_awake, length_awake = run(Awake())
    assert max(calls) == 199
    assert torch.equal(total[:-1], total_awake[:-1]) and torch.equal(length[:-1], length_awake[:-1])
    assert length_awake[-1] == 200


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_candidates_share_their_luck(precision):
    """Identical controllers get identical returns, start by start; another controller does not."""
    model = build(end=-1.0).dreamer(precision)
    _, theta = population(model, 2)
    total, length = returns(model, theta[[0, 1, 0, 0]], random_state(model.model, 8))
    total, length = total.view(4, 8), length.view(4, 8)
    assert torch.equal(total[0], total[2]) and torch.equal(total[0], total[3])
    assert torch.equal(length[0], length[2])
    assert not torch.equal(total[0], total[1])
    assert len(total[0].unique()) == 8  # and starts do not share


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_returns_do_not_depend_on_the_unit(precision):
    """Fitness is a controller's own, whoever else is in its unit, wherever it stands there and whatever came before."""
    model = build(end=-1.0)
    _, theta = population(model, 12)
    spec = {
        "model": {"kind": "vm", "columns": COLUMNS, "act_dim": 3, "hidden": 24, "mixtures": 3, "head_hidden": 16},
        "controller": {"feat_dim": model.feat_dim, "act_dim": 3},
        "codec": CODEC,
    }
    workers = [DreamWorker(spec, starts=6, horizon=20, precision=precision) for _ in range(2)]
    for worker in workers:
        worker.load(model.state_dict(), first_observations(30))
    theta = theta.double().numpy()
    a = np.concatenate([workers[0].evaluate(unit, 5)[0] for unit in (theta[:4], theta[4:8], theta[8:])])
    order = np.random.default_rng(0).permutation(12)
    b = np.concatenate([workers[1].evaluate(theta[order][at : at + 4], 5)[0] for at in (0, 4, 8)])
    assert (a[order] == b).all()
    assert len(set(a)) == 12
    assert workers[0].rate(theta[0], 5, 6)[0] == pytest.approx(a[0], abs=0.05)


def test_worker_dreams_in_the_weights_it_loaded_last():
    model = build()
    spec = {
        "model": {"kind": "vm", "columns": COLUMNS, "act_dim": 3, "hidden": 24, "mixtures": 3, "head_hidden": 16},
        "controller": {"feat_dim": model.feat_dim, "act_dim": 3},
        "codec": CODEC,
    }
    worker = DreamWorker(spec, starts=4, horizon=5, sampled_ends=False)
    _, theta = population(model, 2)
    found = []
    for reward_mean in (0.0, 10.0):
        model.reward_mean.fill_(reward_mean)
        worker.load(model.state_dict(), first_observations(4))
        found.append(worker.evaluate(theta.numpy(), 0)[0])
    assert (found[1] > found[0] + 2).all()


def test_gradients_flow_through_a_dream():
    """Into the model, into the start and, through every step's features, into a differentiable policy."""
    model = build()
    weight = torch.zeros(model.feat_dim, 3, requires_grad=True)
    start = {k: v.requires_grad_() for k, v in random_state(model, 5).items()}
    kept = dream(model, lambda f, t: torch.tanh(f @ weight + 0.1), start, 6, torch.Generator().manual_seed(0))
    assert kept.features.shape == (7, 5, model.feat_dim) and kept.reward.shape == (6, 5)
    (kept.reward[-1].sum() + kept.cont[-1].sum()).backward()  # the last step alone reaches everything before it
    for name, leaf in [("weight", weight), *start.items(), *model.memory.named_parameters()]:
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0, name


def test_repeat_is_candidate_major():
    state = {"z": torch.tensor([[1.0], [2.0]])}
    assert repeat(state, 2)["z"].flatten().tolist() == [1, 2, 1, 2]


def test_the_benchmarks_plain_batch_is_the_same_model():
    model = bench_model()
    state = random_state(model, 9)
    action, noise = torch.eye(3)[[0, 1, 2] * 3], model.noise(9, torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, h, c, _, cont = Plain(model)(*(state[k] for k in "zhc"), action)
        expected = model.imagine(state, action, noise)
    torch.testing.assert_close(h, expected.state["h"])
    torch.testing.assert_close(c, expected.state["c"])
    assert (cont == 1).all()  # nobody dies: a unit is always the same work
    products = sum(2 * m * k * n for m, k, n in step_shapes()) / ROWS
    assert flop_per_step() == products + 2 * 288 * 3  # and the controller's


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_benchmarks_unit_is_a_dream_workers(precision):
    from raywm.bench import dream as bench

    whole = bench.POPULATION * bench.ROLLOUTS * bench.HORIZON
    assert 0.98 * whole < bench._unit(precision, 1)() <= whole
