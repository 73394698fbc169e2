"""An update as a CUDA graph sees it: the same calls on the same tensors, that wait for nothing."""

from __future__ import annotations

import contextlib

import pytest
import torch
from test_dreamer import MIXED, make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from raywm import config as configs
from raywm.learners.dreamer import tensors
from raywm.learners.graphs import Graphs
from raywm.models import rssm

KINDS = [
    {},
    {"dreamer__precision": "bf16", "rssm__standardise": "true"},
    {"dreamer__accumulate": 2, "dreamer__dream_last": 3},
    {"rssm__latent": "gaussian", "rssm__stoch": 6, "dreamer__optimiser": "adam"},
    {"rssm__size": "1M", "rssm__deter": 64, "dreamer__context": 0},
    {"columns": MIXED, "action": "multi_discrete"},
    {"action": "box", "dreamer__actor_grad": "dynamics"},
]
ids = [",".join(f"{k}={v}" for k, v in kind.items() if k != "columns") or "plain" for kind in KINDS]


class Calls(TorchDispatchMode):
    """Keeps every call of a run with its very tensors."""

    def __init__(self):
        super().__init__()
        self.calls, self.fresh = [], True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, out))))
        return out

    @torch.no_grad()
    def replay(self):
        """Make the calls again on the tensors as they are now; what a call makes goes where it lay. CUDA's recording
        makes none, this one has made them once."""
        if self.fresh:
            self.fresh = False
            return
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            if not any(result.alias_info for result in func._schema.returns):  # in place, and views: it is there
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


class Replayed:
    """Records as CUDA graphs do: no line of Python runs again."""

    def plain(self, run):
        return run()

    def record(self, run):
        with Calls() as calls:
            before = torch.get_rng_state()
            result = run()
        assert torch.equal(torch.get_rng_state(), before), "drew from the generator of all"
        return calls.replay, result


def recorded(**kind):
    learner, _ = make(**kind)
    learner._graphs = Graphs(learner._update, Replayed())
    return learner


def batches(count, B=4, **kind):
    """Different ones, of which the later have states stored for some of their sequences."""
    learner, _ = make(B=B, **kind)
    out = []
    for seed in range(count):
        _, batch = make(B=B, seed=seed, **kind)
        if seed > 3 and learner.config["context"]:
            state = {k: torch.randn_like(v) for k, v in learner.model.initial(B).items()}
            batch.stored, batch.known = (
                learner.model.pack(state),
                (torch.arange(B) % 2 == seed % 2).to(batch.mask.device),
            )
        out.append(batch)
    return out


FAST = [(KINDS[0], "CPU"), (KINDS[1], "GPU")]


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        pytest.param(kind, where, id=f"{id}-{where}", marks=[] if (kind, where) in FAST else pytest.mark.slow)
        for kind, id in zip(KINDS, ids)
        for where in ("CPU", "GPU")
    ],
)
def test_replays_are_the_plain_updates(kind, where, monkeypatch):
    """On the CPU, as this device updates, and as a GPU does: dreams of one-hots, the scan in bf16 where all is."""
    if where == "GPU":
        monkeypatch.setattr(rssm, "PLAIN_DETER", 0)
        monkeypatch.setattr(rssm.RSSM, "compact", lambda self: rssm.RSSM.dreamer(self))
        monkeypatch.setattr(rssm.RSSM, "begin", lambda self, state: state, raising=False)
    plain, graph = make(**kind)[0], recorded(**kind)
    for batch in batches(6, **kind):
        told, said = plain.update(batch), graph.update(batch)
        assert told.keys() == said.keys()
        for name, value in told.items():
            assert torch.equal(value, said[name]), name
        assert all(torch.equal(value, graph.states[name]) for name, value in plain.states.items())
    assert len(graph._graphs._made) == 1
    after = graph.tensors()
    assert all(torch.equal(value, after[name]) for name, value in plain.tensors().items())


@pytest.mark.slow
def test_each_shape_has_a_recording():
    plain, graph = make()[0], recorded()
    wide, narrow = batches(4), batches(4, T=4)
    for batch in [*wide, *narrow, wide[0], narrow[0]]:
        told, said = plain.update(batch), graph.update(batch)
        assert all(torch.equal(value, said[name]) for name, value in told.items())
    assert len(graph._graphs._made) == 2


def test_what_was_loaded_is_what_a_replay_goes_on_from():
    plain, graph = make()[0], recorded()
    first, *rest = batches(3)
    for _ in range(4):
        kept = plain.update(first)["model_loss"]
        graph.update(first)
    saved = plain.tensors()
    for batch in rest:
        graph.update(batch)
    graph.load(saved)
    told, said = plain.update(first), graph.update(first)
    assert all(torch.equal(value, said[name]) for name, value in told.items())
    assert kept != told["model_loss"]


def test_a_batch_that_is_refused_is_no_step():
    learner, batch = make(dreamer__accumulate=3)
    with pytest.raises(ValueError, match="accumulate=3"):
        learner.update(batch)
    whole, _ = make()
    learner.config["accumulate"] = 1
    assert torch.equal(learner.update(batch)["grad_norm"], whole.update(batch)["grad_norm"])
    assert learner.optimiser.steps == whole.optimiser.steps == 1


def test_a_batch_s_leaves_are_all_its_tensors():
    *_, batch = batches(5)
    batch.start = {"deter": torch.zeros(4, 2)}
    found = {id(t) for t in tree_leaves([vars(batch)]) if isinstance(t, torch.Tensor)}
    assert found == {id(t) for t in batch.leaves().values()} and len(found) == 12


class Stays(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_meta, f"{func} of a {tensor.device} tensor"
        return out


@pytest.mark.parametrize("kind", [KINDS[2], *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[3:])])
def test_an_update_waits_for_nothing_and_stays_on_its_device(kind, monkeypatch):
    """On the device without numbers, where whoever asks for one gets an error. It knows no autocast."""

    class Generator(torch.Generator):
        device = torch.device("meta")

        def __new__(cls, device):
            return super().__new__(cls)

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *a: False)
    learner, batch = make(device="meta", **kind)
    for _ in range(2):
        with Stays():
            metrics = learner.update(batch)
    assert all(value.is_meta for value in metrics.values())
    with pytest.raises(RuntimeError, match="meta"):
        metrics["model_loss"].item()


def test_without_a_gpu_it_is_an_error():
    base = {"algorithm": "dreamer", "env": {"id": "CartPole-v1"}}
    for dreamer in ({"num_gpus": 0}, {"num_gpus": 1, "learners": 2}):
        with pytest.raises(ValueError, match=r"dreamer.cuda_graph: got true .* expected false, or one learner"):
            configs.parse({**base, "dreamer": {"cuda_graph": True, **dreamer}})
    assert configs.parse({**base, "dreamer": {"cuda_graph": True, "num_gpus": 1}}).dreamer.cuda_graph
    with pytest.raises(ValueError, match="device=cpu, ranks=1; expected one learner on a GPU"):
        make(dreamer__cuda_graph="true", dreamer__num_gpus=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_cuda_graphs_are_the_plain_updates(kind):
    """Weights come to the same place, seen from where they began."""
    kind = kind | {"device": "cuda", "dreamer__lr": 1e-3, "dreamer__warmup": 0}
    plain, graph = make(**kind)[0], make(**kind, dreamer__cuda_graph="true", dreamer__num_gpus=1)[0]
    began = torch.cat([t.flatten() for t in tensors(plain.model)])
    for batch in batches(12, **kind):
        told, said = plain.update(batch), graph.update(batch)
        for name, value in told.items():
            torch.testing.assert_close(said[name], value, rtol=0.02, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert len(graph._graphs._made) == 1 and graph.optimiser.steps == 12
    ours, theirs = (torch.cat([t.flatten() for t in tensors(of.model)]) for of in (graph, plain))
    assert (ours - theirs).norm() < 0.05 * (theirs - began).norm()
    for name, value in plain.states.items():
        torch.testing.assert_close(graph.states[name].float().mean(), value.float().mean(), rtol=0.05, atol=0.01)
