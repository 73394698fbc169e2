"""What an online run tells of itself: losses, how busy everybody is, and how old the weights are that act."""

from __future__ import annotations

import time
from typing import Any


class Figures:
    """Sums since the last report, and over the run (``totals``, JSON, for checkpoints).

    `workers`: how many there are of a kind of work that several do. Busy is the share of the time in which a worker
    really works: not waiting for orders, for batches or for the ratio.
    """

    def __init__(self, workers: dict[str, int]):
        self.workers = workers
        self.totals: dict[str, Any] = {
            "busy": {"collect": 0.0, "learn": 0.0, "evaluate": 0.0},  # seconds
            "seconds": 0.0,
            "staleness": [0, 0, 0],  # the most, the sum, of so many orders
        }
        self.start(0)

    def start(self, steps: int) -> None:
        """A new interval begins, with the run at so many steps."""
        self._began, self._steps, self._count = time.monotonic(), steps, 0
        self._sums: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._stale: list[int] = []

    @property
    def age(self) -> float:
        """Seconds of the interval."""
        return time.monotonic() - self._began

    def work(self, kind: str, seconds: float) -> None:
        """Somebody has worked for so long."""
        self._busy[kind] = self._busy.get(kind, 0.0) + seconds
        self.totals["busy"][kind] += seconds

    def stale(self, updates: int) -> None:
        """Weights that acted until now were so many updates behind."""
        self._stale.append(updates)
        most, total, count = self.totals["staleness"]
        self.totals["staleness"] = [max(most, updates), total + updates, count + 1]

    def learned(self, count: int, metrics: dict[str, float]) -> None:
        """So many updates, and the means of their metrics."""
        self._count += count
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + count * value

    def report(self, steps: int) -> dict[str, float | None]:
        """The interval's figures; the next one begins. `steps`: of the run by now."""
        seconds, stale = max(self.age, 1e-9), self._stale
        self.totals["seconds"] += seconds
        told: dict[str, float | None] = {name: value / self._count for name, value in self._sums.items()}
        told |= {
            "staleness_mean": sum(stale) / len(stale) if stale else None,
            "staleness_max": max(stale, default=None),
            "steps_per_second": (steps - self._steps) / seconds,
            "updates_per_second": self._count / seconds,
        }
        told |= self._shares(self._busy, seconds)
        self.start(steps)
        return told

    def summary(self) -> dict[str, float | None]:
        """The run's figures."""
        most, total, count = self.totals["staleness"]
        ages = {"staleness_mean": total / count if count else None, "staleness_max": most if count else None}
        return ages | self._shares(self.totals["busy"], max(self.totals["seconds"], 1e-9))

    def _shares(self, busy: dict[str, float], seconds: float) -> dict[str, float | None]:
        return {f"busy_{kind}": spent / seconds / self.workers.get(kind, 1) for kind, spent in busy.items()}
