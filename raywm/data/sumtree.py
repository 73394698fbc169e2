"""Sampling in proportion to priorities: a sum tree of fan-out 64."""

from __future__ import annotations

import numpy as np

FAN = 64  # children of a node: 10M leaves are 4 levels, and a level costs the same few numpy calls at any width


class SumTree:
    """`size` leaves with a priority each (0 at first); draws leaves in proportion to them.

    Every node is summed again from its children when one of them changes, so no error builds up over updates.
    Leaves are float32 and sums float64: 4.1 bytes a leaf.
    """

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"a tree of {size} leaves, expected at least 1")
        self.size = size
        width = -(-size // FAN)
        # level 0: the leaves; a row holds the children of one node of the level above
        self._levels: list[np.ndarray] = [np.zeros((width, FAN), np.float32)]
        while width > 1:
            width = -(-width // FAN)
            self._levels.append(np.zeros((width, FAN)))
        self._leaves = self._levels[0].reshape(-1)

    @property
    def total(self) -> float:
        """The sum of all priorities."""
        return float(self._levels[-1].sum(dtype=np.float64))

    def __getitem__(self, leaves: np.ndarray) -> np.ndarray:
        return self._leaves[leaves]

    def set(self, leaves: np.ndarray, priorities: np.ndarray | float) -> None:
        """Give leaves (N,) their priorities (N,) >= 0; of a leaf given twice the last one holds."""
        self._leaves[leaves] = priorities
        nodes = leaves
        for level, above in zip(self._levels, self._levels[1:]):
            nodes = np.unique(nodes // FAN)
            above.reshape(-1)[nodes] = level[nodes].sum(1, dtype=np.float64)

    def draw(self, B: int, rng: np.random.Generator) -> np.ndarray:
        """B leaves in proportion to their priorities: one from each of B equal shares of the total (stratified)."""
        return self.find((np.arange(B) + rng.random(B)) / B * self.total)

    def find(self, mass: np.ndarray) -> np.ndarray:
        """The leaf in which the running sum of priorities passes `mass` (N,), each in [0, total)."""
        node = np.zeros(len(mass), np.int64)
        for level in reversed(self._levels):
            sums = level[node].cumsum(1, dtype=np.float64)  # (N, FAN)
            # A child's own sum may be a rounding away from its share in the parent: never pass its last priority.
            mass = np.minimum(mass, np.nextafter(sums[:, -1], 0))
            child = (sums > mass[:, None]).argmax(1)
            before = np.where(child > 0, sums[np.arange(len(node)), child - 1], 0)
            mass, node = mass - before, node * FAN + child
        return node
