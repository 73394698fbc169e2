"""CMA-ES (Hansen, arXiv 1604.00772) on controllers, by pycma, as a search that can be rebuilt from its fitnesses."""

from __future__ import annotations

import warnings

import numpy as np

with warnings.catch_warnings():  # pycma warns about optional plotting at import
    warnings.simplefilter("ignore")
    import cma

FULL_LIMIT = 512  # parameters from which on a full covariance costs more than the dreams it guides


class CMAES:
    """Ask / tell. Fitness is maximised.

    Its whole randomness is one seeded stream, so replaying the fitnesses it was told, in order, gives the same search
    again with its covariance: that record (generations x population) is all a checkpoint keeps.

    Args:
        mean: start (D,); sigma: initial step size; population: candidates a generation; seed: of its draws;
        separable: a diagonal covariance, "auto" from 512 parameters on.
    """

    def __init__(self, mean: np.ndarray, sigma: float, population: int, seed: int, separable: bool | str = "auto"):
        self._rng = np.random.default_rng(seed)
        diagonal = len(mean) >= FULL_LIMIT if separable == "auto" else bool(separable)
        options = {
            "popsize": population,
            "seed": np.nan,  # pycma must not touch numpy's global generator: ours is passed in
            "randn": lambda *shape: self._rng.standard_normal(shape),
            "CMA_diagonal": diagonal,
            "verbose": -9,
            "maxiter": np.inf,
        }
        self.es = cma.CMAEvolutionStrategy(np.asarray(mean, float), sigma, options)
        self.history: list[np.ndarray] = []
        self._asked: list[np.ndarray] | None = None

    def ask(self) -> np.ndarray:
        """(P, D) candidates of the next generation."""
        if self._asked is None:
            self._asked = self.es.ask()
        return np.stack(self._asked)

    def tell(self, fitness: np.ndarray) -> None:
        """Fitness (P,) of what `ask` gave; larger is better.

        Raises:
            ValueError: a fitness that is not finite.
        """
        fitness = np.asarray(fitness, float)
        if not np.isfinite(fitness).all():
            raise ValueError(f"got fitness {fitness}, expected finite numbers: the dream diverged; lower fit.lr")
        self.ask()
        self.es.tell(self._asked, (-fitness).tolist())
        self._asked = None
        self.history.append(fitness)

    def replay(self, history: np.ndarray) -> None:
        """Go through recorded generations again (G, P)."""
        for fitness in history:
            self.tell(fitness)

    @property
    def mean(self) -> np.ndarray:
        """The distribution's mean: less lucky, and so better in reality, than the best candidate seen."""
        return np.asarray(self.es.mean, float)

    @property
    def sigma(self) -> float:
        return float(self.es.sigma)
