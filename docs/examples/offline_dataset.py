"""A dataset, collected once, and world models fitted to it without an environment.

    raywm collect CartPole-v1 --episodes 200 --out data/cartpole
    python offline_dataset.py data/cartpole

A dataset is a folder (or a URI) of Arrow segments; `raywm data export` turns it into Parquet, Minari or RLlib's schema,
and `raywm data import` makes one from Minari, Parquet or the NumPy files of the World Models repositories.
"""

import sys

import torch

from raywm.data.dataset import Dataset
from raywm.data.store import Snapshot
from raywm.evaluate import open_loop_error
from raywm.fit import Trainer
from raywm.models import build_model
from raywm.spaces import is_image


def fit(path, hidden, steps):
    """The k-step error on held-out episodes of an M with so many hidden units."""
    with Dataset(path) as data:  # episodes are views of its files: they are read while it is open
        snapshot = Snapshot(list(data), data.codec)
        shapes = {name: (box.shape, is_image(box)) for name, box in data.columns.items()}
        torch.manual_seed(0)
        model = build_model("vm", shapes, data.codec.dim, hidden=hidden)
        trainer = Trainer(model, seed=0, memory_steps=steps, sequence=32)
        trainer.fit(snapshot, iteration=0)
        _, held = snapshot.split(trainer.held_out)
        latents = [trainer.latents[e.id] for e in held.episodes]
        return open_loop_error(model.eval(), data.codec, held.episodes, latents, torch.Generator().manual_seed(0))


if __name__ == "__main__":
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 400
    for hidden in (16, 64):
        error = fit(sys.argv[1], hidden, steps)
        print(f"hidden {hidden}: " + ", ".join(f"{k} {v:.3f}" for k, v in error.items()))
