"""What an update is made of: its FLOPs, its matrix products alone, and where its time goes by kind of work."""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

# The first that matches an operator's name; what matches none is elementwise.
KINDS = {
    "matrix products": r"mm$|bmm|conv|linear|matmul",
    "norms": r"layer_norm|native_batch_norm",
    "activations": r"silu|sigmoid|tanh|softmax|softplus|logsumexp",
    "copies and views": r"cat$|stack|copy|clone|contiguous|empty|zero|fill|::to$|view|reshape|transpose|::t$|permute|"
    r"expand|slice|select|narrow|split|chunk|unbind|unsqueeze|squeeze|as_strided|detach|alias|flatten|resize|ones|new_",
}
OPTIMISER, SAMPLING, DISPATCH, ELEMENTWISE = "optimiser", "sampling", "Python and dispatch", "elementwise and sums"
MARK = "## "  # of our own ranges
BACKWARD = "autograd::engine::evaluate_function"
REPEATS_S = 0.2  # at most, for each shape of a product


class Products(TorchDispatchMode):
    """Counts FLOPs while it is entered, and can run the same matrix products and convolutions again, alone.

    torch's FlopCounterMode also tracks modules, which fails where one is called without gradients on a slice that has
    some. FLOPs of a product are 2 m n k, as there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop, self.calls, self.made = 0.0, Counter[str](), dict[str, Callable[[], Any]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flop += count(*args, **kwargs, out_val=out)
            like = tree_map_only(Tensor, lambda t: (tuple(t.shape), t.stride(), t.dtype, t.device), (args, kwargs))
            key = f"{func} {like}"
            self.calls[key] += 1
            if key not in self.made:
                shapes = tree_map_only(Tensor, Like, (args, kwargs))

                def call(func: Any = func, shapes: Any = shapes) -> Callable[[], Any]:
                    made, named = tree_map_only(Like, Like.tensor, shapes)
                    return lambda: func(*made, **named)

                self.made[key] = call
        return out

    def seconds(self) -> float:
        """Time of all of them alone, on warm memory, one shape after the other."""
        total = 0.0
        with torch.no_grad():
            for key, count in self.calls.items():
                call = self.made[key]()
                call()
                done, start = 0, time.perf_counter()
                while done < count and (time.perf_counter() - start < REPEATS_S or not done):
                    call()
                    done += 1
                _wait()
                total += (time.perf_counter() - start) / done * count
        return total


class Like:
    """The shape, layout, type and place of a tensor."""

    def __init__(self, tensor: Tensor):
        self.shape, self.stride, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    def tensor(self) -> Tensor:
        size = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        return torch.randn(size, device=self.device).to(self.dtype).as_strided(self.shape, self.stride)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def profile(learner: Any, batch: Any) -> dict[str, dict[str, float]]:
    """Where an update of a DreamerLearner spends this process's time.

    Returns shares of the whole: "kinds" (of work, each operator's own time; what the CPU does beside operators is
    "Python and dispatch") and "phases" (the scan over the observations, the dream, ...).
    """
    with _ranges(learner), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with torch.profiler.record_function(f"{MARK}update"):
            learner.update(batch)
    events = list(profiler.events() or [])
    whole = next(e for e in events if e.name == f"{MARK}update")
    inside = [e for e in events if whole.time_range.start <= e.time_range.start <= whole.time_range.end]
    inside = [e for e in inside if e.thread == whole.thread]
    kinds, phases = Counter[str](), Counter[str]()
    for event in inside:
        above = list(_ancestors(event))
        kinds[_kind(event.name, above)] += event.self_cpu_time_total
        if event.name.startswith(BACKWARD) and not any(a.startswith(BACKWARD) for a in above):
            phases["backward"] += event.cpu_time_total
        elif event.name in (f"{MARK}observe", f"{MARK}dream", f"{MARK}{OPTIMISER}"):
            phases[event.name.removeprefix(MARK)] += event.cpu_time_total
    total = whole.cpu_time_total
    phases["heads, losses and the rest"] = total - sum(phases.values())
    return {
        "kinds": {k: v / total for k, v in kinds.most_common()},
        "phases": {k: v / total for k, v in phases.most_common()},
    }


def _ancestors(event: Any) -> Iterator[str]:
    while (event := event.cpu_parent) is not None:
        yield event.name


def _kind(name: str, above: list[str]) -> str:
    for mine in (OPTIMISER, SAMPLING):
        if f"{MARK}{mine}" in (name, *above):
            return mine
    if re.search(r"rand|uniform_|normal_|multinomial", name):
        return SAMPLING
    if not name.startswith("aten::"):
        return DISPATCH  # our ranges, and autograd's nodes
    return next((kind for kind, names in KINDS.items() if re.search(names, name)), ELEMENTWISE)


@contextlib.contextmanager
def _ranges(learner: Any) -> Iterator[None]:
    """Names for the parts of an update in a profile."""
    from raywm.learners import dreamer
    from raywm.models import heads

    def named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def ranged(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(f"{MARK}{name}"):
                return call(*args, **kwargs)

        return ranged

    with contextlib.ExitStack() as stack:
        for owner, attribute, name in (
            (learner.model, "observe", "observe"),
            (learner.optimiser, "move", OPTIMISER),
            (dreamer, "dream", "dream"),
            (heads, "draw", SAMPLING),
        ):
            patch = mock.patch.object(owner, attribute, named(name, getattr(owner, attribute)))
            stack.enter_context(patch)
        yield
