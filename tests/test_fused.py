"""Pieces that are compiled say what the plain ones say."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_dreamer import make
from test_graphs import KINDS, batches, ids

from raywm.bench.dreamer import raywm_works
from raywm.models import fused, rssm
from raywm.models.fused import fusible, fusing


@pytest.fixture
def compiled(monkeypatch):
    """The functions that were compiled; none may have been before."""
    seen, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: seen.append(f.__name__) or compile(f, **kwargs))
    return seen


def test_pieces_are_compiled_inside_alone(compiled):
    @fusible
    def cell(x, weight, bias, deter, gates):
        return rssm.gated(deter, gates, bias) + fused.normed(x, weight, bias, 1e-5, deter)

    torch.manual_seed(0)
    inputs = [torch.randn(5, 8), torch.rand(8), torch.randn(8), torch.randn(5, 8), torch.randn(5, 24)]
    inputs = [x.requires_grad_() for x in inputs]
    plain = cell(*inputs)
    wanted = torch.autograd.grad(plain.square().sum(), inputs)
    assert not compiled
    with fusing(False):
        cell(*inputs)
    assert not compiled
    with fusing():
        result = cell(*inputs)
    assert compiled == ["cell"]  # what it calls is a part of it
    torch.testing.assert_close(result, plain)
    torch.testing.assert_close(torch.autograd.grad(result.square().sum(), inputs), wanted)
    with fusing():
        assert torch.equal(cell(*inputs), result) and compiled == ["cell"]


def test_a_piece_that_cannot_be_compiled_is_an_error():
    @fusible
    def looks(x):
        return x + 1 if x.sum().item() > 0 else x

    with fusing(), pytest.raises(torch._dynamo.exc.TorchDynamoException):
        looks(torch.ones(2))
    assert looks(torch.ones(1)) == 2


def test_without_a_compiler_it_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()  # what was compiled before
    with torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}):
        said = r"dreamer.compile: got true.*\(.*no-compiler.*\); expected false, or a C\+\+ compiler"
        with pytest.raises(ValueError, match=said):
            make(dreamer__compile="true")


def test_a_function_may_have_many_shapes_in_any_thread():
    @fusible
    def double(x):
        return 2 * x

    def shapes():
        with fusing():
            return [double(torch.ones(n)).sum().item() for n in range(2, 14)]

    with fusing():
        double(torch.ones(1))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(shapes).result() == [2.0 * n for n in range(2, 14)]


@pytest.mark.slow
def test_a_compiled_update_is_benched():
    works = raywm_works("vector", ["rssm.size=nano", "dreamer.compile=true"], (2, 4))
    facts = works["facts"]()
    assert facts["flop"] == raywm_works("vector", ["rssm.size=nano"], (2, 4))["facts"]()["flop"] > 0
    before = unique_graphs()
    assert works["update"]() == 1 and unique_graphs() == before > 5


def unique_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WAYS = ["cpu", pytest.param("cuda", marks=GPU), pytest.param("cuda graph", marks=GPU)]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_compiled_updates_are_the_plain_ones(kind, way):
    """From the same weights each time: one number that rounds to another class would be another dream."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kind = kind | {"device": way.split()[0]}
    graph = {"dreamer__cuda_graph": "true", "dreamer__num_gpus": 1} if way == "cuda graph" else {}
    plain, fast = make(**kind)[0], make(**kind, **graph, dreamer__compile="true")[0]
    bf16, compiled = kind.get("dreamer__precision") == "bf16", []
    for batch in batches(6, **kind):
        told, said = plain.update(batch), fast.update(batch)
        assert told.keys() == said.keys()
        for name, value in told.items():
            near = {"rtol": 0.05, "atol": 0.02} if bf16 else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(said[name], value, **near, msg=lambda m, name=name: f"{name}: {m}")
        theirs, ours = plain.optimiser.first, fast.optimiser.first
        assert torch.cosine_similarity(ours, theirs, dim=0) > (0.98 if bf16 else 0.999)
        fast.load(plain.tensors())
        compiled.append(unique_graphs())
    # cell, norms, draws, a step of the dream and the actor, or those of them that this kind has; once and for all
    assert compiled[0] >= 5 and compiled[-1] == compiled[0]
