"""Fitting a world model to a frozen snapshot of episodes, phase by phase."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from raywm.data.batch import Batch
from raywm.data.store import Snapshot
from raywm.models.base import WorldModel
from raywm.seeding import derive
from raywm.seeding import rng as stream

BF16_WEIGHTS = 500_000  # of a model, from which AVX512-BF16 pays
Latents = list[dict[str, np.ndarray]]


class Trainer:
    """Fits a model's phases in turn: statistics, vision, one encoding of every frame, memory.

    Args:
        model: the world model; warm-started from where the last fit left it.
        seed: the run's seed; every fit derives its streams from it and the iteration.
        vision_steps, memory_steps: gradient steps of a fit at the most (memory_steps of any phase but "vision");
            refit: share of them after iteration 0;
            vision_batch (frames), batch x sequence (sequences x rows); lr, vision_lr: Adam's, by cosine to a tenth;
            held_out: share of episodes kept out;
        precision: of V's convolutions, fp32 | bf16 | auto (bf16 where the hardware multiplies it faster). M stays fp32.
        evaluate_every, patience: the fit stops when the held-out loss has not improved for so many looks, and
            keeps the best weights.
    """

    def __init__(
        self,
        model: WorldModel,
        seed: int,
        *,
        vision_steps: int = 2000,
        vision_batch: int = 128,
        memory_steps: int = 1500,
        batch: int = 32,
        sequence: int = 64,
        lr: float = 3e-3,
        vision_lr: float = 1e-3,
        refit: float = 1.0,
        held_out: float = 0.1,
        patience: int = 5,
        evaluate_every: int = 100,
        device: str = "cpu",
        precision: str = "auto",
    ):
        self.model, self.seed, self.device = model.to(device), seed, device
        self.steps = {p: vision_steps if p == "vision" else memory_steps for p in model.phases}
        self.vision_batch, self.batch, self.sequence = vision_batch, batch, sequence
        self.lr = {p: vision_lr if p == "vision" else lr for p in model.phases}
        self.refit = refit
        self.held_out, self.patience, self.evaluate_every = held_out, patience, evaluate_every
        weights = sum(p.numel() for p in self._parameters("vision")) if "vision" in model.phases else 0
        self.bf16 = precision == "bf16" or (precision == "auto" and has_fast_bf16(device, weights))
        self.optimisers = {p: torch.optim.Adam(self._parameters(p), self.lr[p], foreach=True) for p in model.phases}
        self.latents: dict[str, dict[str, np.ndarray]] = {}  # of the last fit's episodes, by id

    def _parameters(self, phase: str) -> list[torch.nn.Parameter]:
        parts = getattr(self.model, phase, self.model)
        return list(parts.parameters())

    def optimiser_tensors(self) -> dict[str, torch.Tensor]:
        """Adam's state as flat named CPU tensors, "phase.index.leaf"."""
        return {
            f"{phase}.{i}.{k}": torch.as_tensor(v).detach().cpu().clone()
            for phase, optimiser in self.optimisers.items()
            for i, leaves in optimiser.state_dict()["state"].items()
            for k, v in leaves.items()
        }

    def load_optimisers(self, tensors: dict[str, torch.Tensor]) -> None:
        """The opposite of `optimiser_tensors`; none at all gives fresh optimisers."""
        for phase, optimiser in self.optimisers.items():
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in tensors.items():
                of, i, leaf = name.split(".")
                if of == phase:
                    state.setdefault(int(i), {})[leaf] = value.clone()
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})

    def fit(
        self, snapshot: Snapshot, iteration: int, report: Callable[..., None] = lambda **_: None
    ) -> list[dict[str, Any]]:
        """Fit every phase to `snapshot`. Calls `report(phase=, step=, steps=, loss=)` as it goes.

        Returns:
            one row of metrics a look at the held-out episodes, of every phase.
        Raises:
            ValueError: fewer than two episodes (one is held out), or a loss that is not finite.
        """
        if len(snapshot.episodes) < 2:
            raise ValueError(
                f"got {len(snapshot.episodes)} episode(s), expected at least 2 (one is held out); "
                "raise collect.initial_steps"
            )
        train, held = snapshot.split(self.held_out)
        self.model.adapt(self._statistics(train))
        rows = []
        if "vision" in self.model.phases:
            rows += self._fit_phase("vision", train, held, None, None, iteration, report)
        latents = {e.id: z for e, z in zip(snapshot.episodes, self.encode(snapshot), strict=True)}
        self.latents = latents
        of = lambda part: [latents[e.id] for e in part.episodes]  # noqa: E731
        self.model.adapt(latent_statistics(of(train)))
        last = self.model.phases[-1]
        return rows + self._fit_phase(last, train, held, of(train), of(held), iteration, report)

    def _statistics(self, snapshot: Snapshot) -> dict[str, dict[str, torch.Tensor]]:
        columns: dict[str, list[np.ndarray]] = {"reward": [e.reward[1:] for e in snapshot.episodes]}
        for name, value in snapshot.episodes[0].obs.items():
            if value.dtype != np.uint8:
                columns[name] = [e.obs[name] for e in snapshot.episodes]
        return {name: spread(parts) for name, parts in columns.items()}

    @torch.inference_mode()
    def encode(self, snapshot: Snapshot, chunk: int = 512) -> Latents:
        """What the model's vision makes of every frame, computed once: a dict of (T, *) arrays an episode."""
        self.model.eval()
        out = []
        for episode in snapshot.episodes:
            parts = []
            for at in range(0, len(episode.reward), chunk):
                piece = {k: torch.tensor(v[at : at + chunk]) for k, v in episode.obs.items()}
                with self._autocast():
                    parts.append(self.model.encode({k: v.to(self.device) for k, v in piece.items()}))
            out.append({k: np.concatenate([p[k].float().cpu().numpy() for p in parts]) for k in parts[0]})
        return out

    def _autocast(self, phase: str = "vision") -> torch.autocast:
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16 and phase == "vision")

    def _fit_phase(
        self,
        phase: str,
        train: Snapshot,
        held: Snapshot,
        latents: Latents | None,
        held_latents: Latents | None,
        iteration: int,
        report: Callable[..., None],
    ) -> list[dict[str, Any]]:
        model, optimiser = self.model, self.optimisers[phase]
        vision = phase == "vision"
        size, length = (self.vision_batch, 1) if vision else (self.batch, self._length(train))
        draw = stream(self.seed, "fit", phase, iteration)
        looks = stream(self.seed, "held-out", phase, iteration)
        held_batches = [held.sample(size, length, looks, held_latents) for _ in range(1 if vision else 4)]
        steps = self.steps[phase] if iteration == 0 else math.ceil(self.steps[phase] * self.refit)
        best, best_weights, since, rows = math.inf, None, 0, []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, "fit", phase, iteration, "torch"))
            for step in range(1, steps + 1):
                for group in optimiser.param_groups:
                    group["lr"] = self.lr[phase] * (0.55 + 0.45 * math.cos(math.pi * step / steps))
                model.train()
                batch = train.sample(size, length, draw, latents).to(self.device)
                with self._autocast(phase):
                    loss = model.loss(batch, phase, states=False).loss.mean()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self._parameters(phase), 1000.0 if vision else 10.0)
                optimiser.step()
                if step % self.evaluate_every == 0 or step == steps:
                    metrics = self._look(held_batches, phase)
                    if not math.isfinite(metrics["loss"]):
                        raise ValueError(f"{phase} loss: got {metrics['loss']}, expected a finite one; lower fit.lr")
                    rows.append({"phase": phase, "step": step, "train_loss": float(loss.detach()), **metrics})
                    if best_weights is None or metrics["loss"] < best - 1e-3:
                        best, best_weights, since = metrics["loss"], copy.deepcopy(model.state_dict()), 0
                    else:
                        since += 1
                    report(phase=phase, step=step, steps=steps, loss=metrics["loss"])
                    if since >= self.patience:
                        break
                elif step % 10 == 0:
                    report(phase=phase, step=step, steps=steps)
        if best_weights is not None:
            model.load_state_dict(best_weights)
        return rows

    def _length(self, snapshot: Snapshot) -> int:
        """Sequences no longer than what nearly all episodes can fill."""
        lengths = [len(e.reward) for e in snapshot.episodes]
        weighted = np.repeat(lengths, lengths)  # an average row's episode, not an average episode
        return int(min(self.sequence, max(2, np.quantile(weighted, 0.9))))

    @torch.inference_mode()
    def _look(self, batches: Iterable[Batch], phase: str) -> dict[str, float]:
        self.model.eval()
        total: dict[str, list[float]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same samples of z at every look
            for batch in batches:
                with self._autocast(phase):
                    fit = self.model.loss(batch.to(self.device), phase, states=False)
                for k, v in {"loss": fit.loss.mean(), **fit.metrics}.items():
                    total.setdefault(k, []).append(float(v))
        out = {k: float(np.mean(v)) for k, v in total.items() if not k.startswith("terminal_")}
        if "terminal_real" in total:
            hits, real, predicted = (sum(total[f"terminal_{k}"]) for k in ("hits", "real", "predicted"))
            out["terminal_recall"] = hits / real if real else math.nan
            out["terminal_precision"] = hits / predicted if predicted else math.nan
        return out


def has_fast_bf16(device: str, weights: int) -> bool:
    """Whether a model of so many weights learns faster in bf16: with tensor cores or AMX, and if it has `BF16_WEIGHTS`
    or more with AVX512-BF16 (measured: 0.85 to 1.1 times as fast below, 1.3 to 2.2 times above)."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()

    def has(what: str) -> bool:
        return getattr(torch.cpu, f"_is_{what}_supported", lambda: False)()  # not in every torch

    return has("amx_tile") or (weights >= BF16_WEIGHTS and has("avx512_bf16"))


def spread(parts: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Mean, std, min and max over all rows of all parts; in float64, as float32 sums of squares lose small spreads."""
    rows = np.concatenate(parts).astype(np.float64)
    figures = {"mean": rows.mean(0), "std": rows.std(0), "min": rows.min(0), "max": rows.max(0)}
    return {name: torch.tensor(value).float() for name, value in figures.items()}


def latent_statistics(latents: Latents) -> dict[str, dict[str, torch.Tensor]]:
    """Mean and spread of z and of its steps z[t+1] - z[t], the spread of sampling z included."""
    if "z_mean" not in latents[0]:
        return {}
    z = spread([e["z_mean"] for e in latents])
    delta = spread([np.diff(e["z_mean"], axis=0) for e in latents])
    noise = torch.tensor(np.mean(np.concatenate([e["z_std"] for e in latents]) ** 2, axis=0)).float()
    z["std"] = (z["std"] ** 2 + noise).sqrt()
    delta["std"] = (delta["std"] ** 2 + 2 * noise).sqrt()
    return {"z": z, "delta": delta}
