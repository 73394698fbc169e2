"""What a run needs, held against what a cluster has before anything starts: actors that do not fit wait for ever."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What a worker at least keeps for itself (unique set size) once it has imported torch and made its environments and
# model. Measured in `raywm train cartpole`: collector 0.18 GiB, dream worker 0.19, shard 0.19, trainer 0.28. A floor
# below them all, so that nothing is refused that would have run.
WORKER_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Need:
    """`count` actors of one kind, on nodes that have all of these `labels`.

    Args:
        who: what they are called; key: of the config, that says how many; cpus, gpus: of each; memory: bytes of each,
        at least.
    """

    who: str
    key: str = ""
    count: int = 1
    cpus: float = 1
    gpus: float = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    memory: float = WORKER_BYTES

    def __str__(self) -> str:
        size = _count(self.cpus, "CPU") + (f" and {_count(self.gpus, 'GPU')}" if self.gpus else "")
        many = "" if self.count == 1 else " each"
        return f"{_count(self.count, self.who)} of {size}{many}" + (f" ({self.key})" if self.key else "")


def missing(needs: Sequence[Need], nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands against the run, in words; nothing does if this is empty.

    nodes: of Ray's ``ray.nodes()``, those alive; of each "Resources" and "Labels" count. Only what must go wrong is
    named: each kind of actor needs room for all of its own, and all kinds together their sums.
    """
    found = [text for need in needs if (text := _no_room(need, nodes))]
    if found:
        return found
    for labels in [dict(items) for items in dict.fromkeys(tuple(sorted(n.labels.items())) for n in needs)] + [{}]:
        bound = [n for n in needs if labels.items() <= n.labels.items()]  # those that can run nowhere else
        there = _having(nodes, labels)
        sums = {
            "CPU": sum(n.count * n.cpus for n in bound),
            "GPU": sum(n.count * n.gpus for n in bound),
            "memory": sum(n.count * n.memory for n in bound),
        }
        for kind, needed in sums.items():
            have = sum(node["Resources"].get(kind, 0) for node in there)
            known = kind != "memory" or all("memory" in node["Resources"] for node in there)
            if known and needed > have + 1e-9:
                amounts = f"{_amount(kind, needed)} needed, {_amount(kind, have)} there"
                text = f"{amounts}{_on(labels)} ({', '.join(map(str, bound))})"
                if text not in found:
                    found.append(text)
    return found


def _no_room(need: Need, nodes: Sequence[Mapping[str, Any]]) -> str:
    there = _having(nodes, need.labels)
    if not there:
        labels = sorted({f"{k}={v}" for node in nodes for k, v in node.get("Labels", {}).items() if k[:4] != "ray."})
        known = f"there are {', '.join(labels)}" if labels else "no node has labels; ray start --labels gives them"
        return f"{need}: no node{_on(need.labels)}, {known}"
    rooms = []
    for node in there:
        have = node["Resources"]
        each = [(have.get("CPU", 0), need.cpus), (have.get("GPU", 0), need.gpus)]
        rooms.append(min((math.floor(a / b + 1e-9) for a, b in each if b), default=need.count))
    if sum(rooms) >= need.count:
        return ""
    kinds = ("CPU", "GPU") if need.gpus else ("CPU",)
    sizes = [" and ".join(_count(node["Resources"].get(kind, 0), kind) for kind in kinds) for node in there]
    nodes_text = ", ".join(f"{_count(sizes.count(size), 'node')} of {size}" for size in dict.fromkeys(sizes))
    return f"{need}: room for {sum(rooms)} on {nodes_text}{_on(need.labels)}"


def _having(nodes: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[Mapping[str, Any]]:
    return [node for node in nodes if labels.items() <= node.get("Labels", {}).items()]


def _on(labels: Mapping[str, str]) -> str:
    return f" labelled {','.join(f'{k}={v}' for k, v in sorted(labels.items()))}" if labels else ""


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def _amount(kind: str, amount: float) -> str:
    return f"{amount / 2**30:.3g} GiB of memory" if kind == "memory" else _count(amount, kind)
