"""An update as a CUDA graph sees it: the same calls on the same tensors, that wait for nothing."""

from __future__ import annotations

import contextlib

import pytest
import torch
from test_dreamer import MIXED, make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from raywm import config as configs
from raywm.learners.graphs import Graphs

KINDS = [
    {},
    {"dreamer__precision": "bf16"},
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


def replayed(run):
    """A recording as a CUDA graph's: no line of Python runs again."""
    with Calls() as calls:
        before = torch.get_rng_state()
        result = run()
    assert torch.equal(torch.get_rng_state(), before), "drew from the generator of all"
    return calls.replay, result


def batches(count, B=4, **kind):
    """Different ones; from the third on with states that are stored for some of the sequences."""
    learner, _ = make(B=B, **kind)
    out = []
    for seed in range(count):
        _, batch = make(B=B, seed=seed, **kind)
        if seed > 2 and learner.config["context"]:
            state = {k: torch.randn_like(v) for k, v in learner.model.initial(B).items()}
            batch.stored, batch.known = learner.model.pack(state), torch.arange(B) % 2 == seed % 2
        out.append(batch)
    return out


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_replays_are_the_plain_updates(kind):
    plain, _ = make(**kind)
    graph, _ = make(**kind)
    graph._graphs = Graphs(graph._update, replayed)
    shapes = set()
    for batch in batches(8, **kind):
        told, said = plain.update(batch), graph.update(batch)
        assert told.keys() == said.keys()
        for name, value in told.items():
            assert torch.equal(value, said[name]), name
        assert all(torch.equal(value, graph.states[name]) for name, value in plain.states.items())
        shapes.add(batch.stored is None)
    assert len(graph._graphs._made) == len(shapes)
    after = graph.tensors()
    assert all(torch.equal(value, after[name]) for name, value in plain.tensors().items())


def test_what_was_loaded_is_what_a_replay_goes_on_from():
    plain, _ = make()
    graph, _ = make()
    graph._graphs = Graphs(graph._update, replayed)
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


class Stays(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_meta, f"{func} of a {tensor.device} tensor"
        return out


@pytest.mark.parametrize("kind", [k for k in KINDS if "dreamer__precision" not in k])
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
    plain, _ = make(device="cuda", **kind)
    graph, _ = make(device="cuda", dreamer__cuda_graph="true", dreamer__num_gpus=1, **kind)
    for batch in batches(8, **kind):
        told, said = plain.update(batch.to("cuda")), graph.update(batch.to("cuda"))
        for name, value in told.items():
            torch.testing.assert_close(said[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert len(graph._graphs._made) == (2 if graph.config["context"] else 1)
