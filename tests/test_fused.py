"""Pieces that are compiled say what the plain ones say."""

from __future__ import annotations

import pytest
import torch
from test_dreamer import make
from test_graphs import KINDS, batches, ids

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
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-compiler"),))
    with pytest.raises(ValueError, match=r"dreamer.compile: got true.*\(.*\); expected false, or a C\+\+ compiler"):
        make(dreamer__compile="true")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_compiled_updates_are_the_plain_ones(kind, device):
    """From the same weights each time: one number that rounds to another class would be another dream."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, fast = make(**kind, device=device)[0], make(**kind, device=device, dreamer__compile="true")[0]
    bf16 = kind.get("dreamer__precision") == "bf16"
    for batch in batches(5, **kind, device=device):
        told, said = plain.update(batch), fast.update(batch)
        assert told.keys() == said.keys()
        for name, value in told.items():
            near = {"rtol": 0.05, "atol": 0.02} if bf16 else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(said[name], value, **near, msg=lambda m, name=name: f"{name}: {m}")
        theirs, ours = plain.optimiser.first, fast.optimiser.first
        assert torch.cosine_similarity(ours, theirs, dim=0) > (0.98 if bf16 else 0.999)
        fast.load(plain.tensors())
    # cell, norms, draws, a step of the dream and the actor, or those of them that this kind has
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 5
