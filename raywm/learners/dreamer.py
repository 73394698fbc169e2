"""Dreamer: a world model learns from replay, an actor and a critic from its dreams (DreamerV3, Nature 2025).

One update, on B sequences of T rows: the model's loss; a dream of H steps from every row, or from the `dream_last` ones
of each sequence; the actor's and the critic's losses on the dream; the critic's loss on those replayed rows; one step
of one optimiser.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raywm.data.batch import Batch
from raywm.dream import dream
from raywm.fit import has_fast_bf16
from raywm.learners.actor import Actor, reparametrised
from raywm.learners.graphs import Cuda, Graphs
from raywm.learners.optim import Optimiser
from raywm.models import build_model
from raywm.models.base import Dreamer, Noise, State
from raywm.models.fused import check_compiler, fusing
from raywm.models.heads import Head, TwoHot
from raywm.seeding import derive


def lambda_return(reward: Tensor, live: Tensor, boot: Tensor, lam: Tensor | float) -> Tensor:
    """R[t] = r[t] + live[t] ((1 - lam) boot[t] + lam R[t+1]), R[H] = boot[H-1] (arXiv 2301.04104, eq. 6).

    All (H, ...): row t is what follows step t: its reward, its discounted chance of going on, the value of where it
    led. `lam` may be 0 where an episode was cut.
    """
    now = reward + live * (1 - lam) * boot
    keep = live * lam
    returns, last = [], boot[-1]
    for t in range(len(reward) - 1, -1, -1):
        last = torch.addcmul(now[t], keep[t], last)
        returns.append(last)
    return torch.stack(returns[::-1])


class Percentiles:
    """The range of returns: running 5th and 95th percentiles; ``scale`` is never below 1 (eq. 7)."""

    def __init__(self, decay: float, device: str | torch.device = "cpu"):
        self.decay, self.low, self.high = decay, torch.zeros((), device=device), torch.zeros((), device=device)

    def update(self, values: Tensor) -> None:
        """Follow the percentiles of values, of any shape."""
        ordered = values.detach().float().flatten().sort().values
        at = [q * (len(ordered) - 1) for q in (0.05, 0.95)]
        low, high = (torch.lerp(ordered[int(a)], ordered[min(int(a) + 1, len(ordered) - 1)], a - int(a)) for a in at)
        self.low.lerp_(low, 1 - self.decay)
        self.high.lerp_(high, 1 - self.decay)

    @property
    def scale(self) -> Tensor:
        return (self.high - self.low).clamp(min=1.0)


class Losses(NamedTuple):
    actor: Tensor  # (H, N), weighted
    critic: Tensor  # (H, N), weighted
    returns: Tensor  # (H, N) lambda-returns


class DreamerLearner:
    """Model, actor and critic, and the one update that trains them.

    Args:
        spec: of ``parts.dreamer_specification``; seed: the run's, of which every update derives its stream.
        device: "cpu", "cuda", ...
        rank, ranks: this learner's among those that share each batch through torch.distributed's default group; its
            batches are its share (B / ranks sequences). All ranks draw the noise of the whole batch and use their part,
            so that any number of them computes the same.

    Attributes: ``updates``, how many have been made.
    """

    def __init__(self, spec: dict[str, Any], seed: int, device: str = "cpu", rank: int = 0, ranks: int = 1):
        d = self.config = dict(spec["dreamer"])
        self.seed, self.device, self.rank, self.ranks, self.updates = seed, torch.device(device), rank, ranks, 0
        torch.manual_seed(derive(seed, "model"))
        self.model = build_model(**spec["model"]).to(self.device)
        actor = spec["actor"]
        features, onehots = self.model.feat_dim, self.model.onehots
        self.actor = Actor(features, self.model.act_dim, **actor, onehots=onehots).to(self.device)
        bins = spec["model"].get("bins", 255)
        self.twohot = TwoHot(bins).to(self.device)
        self.critic = Head(features, actor["units"], actor["layers"], bins, 0.0, onehots).to(self.device)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        modules = [self.model, self.actor, self.critic]
        self.optimiser = Optimiser(modules, d["lr"], d["warmup"], d["agc"], d["optimiser"])
        self.percentiles = Percentiles(d["return_decay"], self.device)
        self.discount = 1 - 1 / d["discount_horizon"]
        weights = sum(p.numel() for p in self.model.parameters())
        self.bf16 = d["precision"] == "bf16" or (d["precision"] == "auto" and has_fast_bf16(device, weights))
        self._fast_actor = (
            copy.deepcopy(self.actor).to(torch.bfloat16).requires_grad_(False) if self.bf16 else self.actor
        )
        self.states: State = {}  # of the last batch without its context, leaves (B, T, *)
        # one a part of a batch, for each part draws the same noise, that of the whole
        self._rngs = [torch.Generator(self.device) for _ in range(d["accumulate"])]
        if d["compile"]:
            check_compiler(self.device)
        self._graphs: Graphs | None = None
        if d["cuda_graph"]:
            if self.device.type != "cuda" or ranks > 1:
                where = f"device={device}, ranks={ranks}"
                raise ValueError(f"dreamer.cuda_graph: got true with {where}; expected one learner on a GPU")
            self._graphs = Graphs(self._update, Cuda(self.device, self._rngs))

    # ------------------------------------------------------------------------------------------------ one update

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step on a batch, whose first ``context`` rows only bring the model into its state: sequences of which
        that state is known (``Batch.stored``) begin with it, the others with what those rows lead to from nothing.
        Sequences are expected to be full, as a replay's that cross from episode to episode: standardised features and
        ``dream_last`` do not look at the mask.

        Returns metrics as tensors without dimensions: nothing waits for the device. Raises ValueError for a batch that
        is no longer than its context.
        """
        stream = derive(self.seed, "update", self.updates)
        for rng in self._rngs:
            rng.manual_seed(stream)
        self.optimiser.count(self.updates + 1)
        with fusing(self.config["compile"]):
            if self._graphs:
                metrics, self.states = self._graphs(self._with_states(batch))
                metrics = {name: value.clone() for name, value in metrics.items()}  # the next update writes over them
            else:
                metrics, self.states = self._update(batch)
        self.updates += 1
        return metrics

    def _with_states(self, batch: Batch) -> Batch:
        """A batch of which no states are stored yet as one where they are not known: one graph serves both."""
        if batch.stored is not None or not self.config["context"]:
            return batch
        nothing = self.model.pack(self.model.initial(len(batch.weight)))
        return replace(batch, stored=nothing, known=torch.zeros_like(batch.is_first[:, 0]))

    def _update(self, batch: Batch) -> tuple[dict[str, Tensor], State]:
        """All of an update that is the same calls on the same tensors for every batch; metrics, and the states."""
        self.optimiser.zero()
        parts = split(batch, self.config["accumulate"])
        metrics: dict[str, Tensor] = {}
        states: list[State] = []
        for index, part in enumerate(parts):
            share = (self.rank * len(parts) + index, self.ranks * len(parts))
            told, state = self._accumulate(part, share, self._rngs[index])
            states.append(state)
            for name, value in told.items():
                metrics[name] = metrics.get(name, 0) + value / len(parts)  # type: ignore[assignment]
        if self.ranks > 1:
            torch.distributed.all_reduce(self.optimiser.grad)
            self.optimiser.grad.div_(self.ranks)
        metrics["grad_norm"] = self.optimiser.move()
        with torch.no_grad():
            slow, fast = tensors(self.slow_critic), tensors(self.critic)
            torch._foreach_lerp_(slow, fast, 1 - self.config["critic_decay"])
        whole = {k: torch.cat([s[k] for s in states]) for k in states[0]}
        self._follow(whole)
        return metrics, whole

    def _follow(self, states: State) -> None:
        model: Any = self.model
        if model.moments is not None:
            moments = model.moments_of(states)
            if self.ranks > 1:
                torch.distributed.all_reduce(moments)
                moments /= self.ranks
            model.follow(moments)

    def _accumulate(
        self, batch: Batch, share: tuple[int, int], rng: torch.Generator
    ) -> tuple[dict[str, Tensor], State]:
        """Add a part's gradients; its metrics, and its states for writing back."""
        model = Shared(self.model, share)
        batch = self._settled(batch, model, rng)
        B, T = batch.is_first.shape
        with self._autocast():
            noise = {k: v.unflatten(0, (B, T)) for k, v in model.noise(B * T, rng).items()}
            fit = self.model.loss(batch, self.model.phases[-1], noise)
            features = self.model.features(fit.states)
            states = {k: v.detach().unflatten(0, (B, T)) for k, v in fit.states.items()}
            K = min(self.config["dream_last"] or T, T)
            last = slice(T - K, None)
            start = {k: v[:, last].flatten(0, 1) for k, v in states.items()}
            losses, told = self._dreamt(start, fit.valid.view(B, T)[:, last].flatten(), model, rng)
            seen = features.unflatten(0, (B, T))[:, last]
            replayed = self._replayed(rows(batch, last), seen, losses.returns[0].view(B, K))
            critic = losses.critic.mean()
            total = fit.loss.mean() + critic + self.config["replay_value"] * replayed
            if self.config["actor_grad"] == "reinforce":
                total = total + losses.actor.mean()
            else:  # the graph goes through model and critic, which this loss must not train
                grads = torch.autograd.grad(losses.actor.mean(), list(self.actor.parameters()))
                for p, g in zip(self.actor.parameters(), grads):
                    p.grad += g / self.config["accumulate"]
        (total / self.config["accumulate"]).backward()
        metrics = {
            **fit.metrics,
            **told,
            "model_loss": fit.loss.detach().mean(),
            "actor_loss": losses.actor.detach().mean(),
            "critic_loss": critic.detach(),
            "replay_critic_loss": replayed.detach(),
        }
        return metrics, states

    def _settled(self, batch: Batch, model: Shared, rng: torch.Generator) -> Batch:
        """The batch without its context, started from the state that is stored for the context's last row, or else
        from the one that the context leads to."""
        K = self.config["context"]
        if not K:
            return batch
        if batch.is_first.shape[1] <= K:
            raise ValueError(f"sequences of {batch.is_first.shape[1]} rows, expected more than the context of {K}")
        before, after = rows(batch, slice(0, K)), rows(batch, slice(K, None))
        B = len(batch.is_first)
        state = self.model.initial(B) if batch.start is None else batch.start
        with torch.no_grad(), self._autocast():
            for t in range(K):
                obs = {k: v[:, t] for k, v in before.obs.items()}
                state = self.model.posterior(
                    state, before.action[:, t], obs, before.is_first[:, t], model.noise(B, rng)
                )
        after.start = {k: v.float() for k, v in state.items()}
        if batch.stored is not None and batch.known is not None:
            known = batch.known.unsqueeze(-1)
            stored = self.model.unpack(batch.stored)
            after.start = {k: torch.where(known, stored[k], v) for k, v in after.start.items()}
        return after

    def latents(self) -> dict[str, Tensor]:
        """The states after the rows of the last batch, without its context, packed for ``Replay.write``: (B * T, *)."""
        return self.model.pack({k: v.flatten(0, 1) for k, v in self.states.items()})

    def _dreamt(
        self, start: State, valid: Tensor, model: Shared, rng: torch.Generator
    ) -> tuple[Losses, dict[str, Tensor]]:
        """Dream from every start; the actor's and the critic's losses (DreamerV3, eq. 8 to 11). Steps weigh as much as
        the chance of coming so far, and starts that are not `valid` (N,), as terminal ones, nothing."""
        d, raw = self.config, []
        through = d["actor_grad"] == "dynamics"
        acting = self.actor if through else self._fast()

        def policy(features: Tensor, t: int) -> Tensor:
            noise = model.drawn(acting.noise, len(features), rng)
            raw.append(reparametrised(acting, features, noise) if through else acting.sample(features, noise))
            return raw[-1].clamp(-1, 1) if acting.kind == "box" else raw[-1]

        dreamer: Any = self.model if through else self.model.dreamer("bf16" if self.bf16 else "fp32")
        if self.model.onehots and not through and self.device.type == "cpu":
            dreamer = dreamer.compact()
            start = dreamer.begin(start)
        with torch.set_grad_enabled(through), self._autocast(through):
            dreamt = dream(model.of(dreamer), policy, start, d["horizon"], rng, states=False)
        features, action = dreamt.features[:-1].detach(), torch.stack(raw).detach()
        logits = self.critic(features)  # (H, N, bins)
        log_p = logits.detach().log_softmax(-1)
        if through:
            value = self.twohot.mean(self.critic(dreamt.features))  # (H+1, N)
        else:
            with torch.no_grad():
                last = self.twohot.mean(self.critic(dreamt.features[-1:]))
            value = torch.cat([self.twohot.mean_of(log_p.exp()), last])
        live = self.discount * dreamt.cont.float()
        returns = lambda_return(dreamt.reward.float(), live, value[1:], d["lam"])
        weight = torch.cumprod(torch.cat([valid.float()[None], live[:-1]]), 0).detach()  # (H, N)
        self._normalise(returns)
        log_prob, entropy = self.actor.judge(features, action)
        if through:
            actor = -weight * (returns / self.percentiles.scale + d["entropy"] * entropy)
        else:
            advantage = (returns - value[:-1]) / self.percentiles.scale
            actor = -weight * (log_prob * advantage + d["entropy"] * entropy)
        critic = weight * self.twohot.loss(logits, returns, self._slow_value(features), log_p=log_p)
        told = {
            "entropy": entropy.detach().mean(),
            "dream_reward": dreamt.reward.detach().mean(),
            "dream_return": returns.detach().mean(),
            "dream_value": value.detach().mean(),
            "dream_cont": dreamt.cont.detach().mean(),
            "return_scale": self.percentiles.scale,
        }
        return Losses(actor, critic, returns.detach()), told

    def _replayed(self, batch: Batch, features: Tensor, boot: Tensor) -> Tensor:
        """The critic's loss on the replayed rows; its bootstrap is the dream's return from there (Nature 2025)."""
        logits = self.critic(features[:, :-1])  # (B, T-1, bins)
        with torch.no_grad():
            live = self.discount * (~batch.is_terminal[:, 1:]).float()
            lam = self.config["lam"] * (~batch.is_last[:, 1:]).float()
            to_time = [x.transpose(0, 1) for x in (batch.reward[:, 1:], live, boot[:, 1:], lam)]  # (B,T) -> (T,B)
            target = lambda_return(*to_time).transpose(0, 1)
            weight = (~batch.is_last[:, :-1] & batch.mask[:, :-1]).float()
            slow = self._slow_value(features[:, :-1])
        return (weight * self.twohot.loss(logits, target, slow)).mean()

    def _slow_value(self, features: Tensor) -> Tensor:
        with torch.no_grad():
            return self.twohot.mean(self.slow_critic(features))

    def _normalise(self, returns: Tensor) -> None:
        if self.ranks > 1:
            every = [torch.empty_like(returns) for _ in range(self.ranks)]
            torch.distributed.all_gather(every, returns.detach().contiguous())
            returns = torch.stack(every)
        self.percentiles.update(returns)

    def _fast(self) -> Actor:
        """The actor as it is now, in the dream's precision."""
        if self._fast_actor is not self.actor:
            torch._foreach_copy_(tensors(self._fast_actor), tensors(self.actor))
        return self._fast_actor

    def _autocast(self, enabled: bool = True) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 and enabled)

    # ------------------------------------------------------------------------------------------------ what remains

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {"model": self.model, "actor": self.actor, "critic": self.critic, "slow_critic": self.slow_critic}

    def tensors(self) -> dict[str, Tensor]:
        """All that the next update depends on: weights, optimiser, percentiles, the count of updates."""
        out = {f"{n}.{k}": v for n, m in self._modules().items() for k, v in m.state_dict().items()}
        out |= {f"optimiser.{k}": v for k, v in self.optimiser.tensors().items()}
        out |= {"percentiles.low": self.percentiles.low, "percentiles.high": self.percentiles.high}
        return {k: v.detach().cpu().clone() for k, v in out.items()} | {"updates": torch.tensor(self.updates)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from ``tensors()``. Raises ValueError for those of another model."""
        try:
            for name, module in self._modules().items():
                module.load_state_dict(under(tensors, name))
        except RuntimeError as error:
            raise ValueError(f"saved weights do not fit this model: {str(error).splitlines()[-1].strip()}") from None
        self.optimiser.load(under(tensors, "optimiser"))
        self.percentiles.low.copy_(tensors["percentiles.low"])
        self.percentiles.high.copy_(tensors["percentiles.high"])
        self.updates = int(tensors["updates"])

    def policy(self) -> dict[str, Tensor]:
        """Copies in host memory of what an agent is made of: "model.*" and "actor.*". The heads and the decoder, which
        acting does not need, are among them: whoever has an agent can dream by the very model that it acts by."""
        modules = {"model": self.model, "actor": self.actor}
        out = {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
        return {k: v.detach().cpu().clone() for k, v in out.items()}


class Shared:
    """A model of which a learner dreams its share of the rows: noise is drawn for all rows, and cut."""

    def __init__(self, model: Dreamer, share: tuple[int, int]):
        self.model, self.share = model, share
        self.imagine, self.advance = model.imagine, model.advance
        self.outcomes, self.features = model.outcomes, model.features

    def of(self, model: Dreamer) -> Shared:
        return Shared(model, self.share)

    def drawn(self, draw: Any, batch: int, rng: torch.Generator) -> Any:
        """What `draw` gives for this share's rows."""
        index, count = self.share
        if count == 1:
            return draw(batch, rng)
        whole, part = draw(batch * count, rng), slice(index * batch, (index + 1) * batch)
        return {k: v[part] for k, v in whole.items()} if isinstance(whole, dict) else whole[part]

    def noise(self, batch: int, rng: torch.Generator) -> Noise:
        return self.drawn(self.model.noise, batch, rng)


def rows(batch: Batch, where: slice) -> Batch:
    """The rows `where` of every sequence; the start goes with the first."""
    cut = {n: getattr(batch, n)[:, where] for n in ("action", "reward", "is_first", "is_last", "is_terminal", "mask")}
    start = batch.start if not where.start else None
    obs = {k: v[:, where] for k, v in batch.obs.items()}
    return Batch(obs=obs, weight=batch.weight, ids=batch.ids, start=start, **cut)


def split(batch: Batch, count: int) -> list[Batch]:
    """Equal parts of a batch's sequences. Raises ValueError where that does not come out even."""
    if count == 1:
        return [batch]
    if len(batch.weight) % count:
        raise ValueError(f"dreamer.accumulate={count} parts of {len(batch.weight)} sequences; expected a divisor")
    parts = {name: tensor.chunk(count) for name, tensor in batch.tensors().items()}
    size, out = len(batch.weight) // count, []
    for i in range(count):
        named: dict[str, Any] = {name: chunks[i] for name, chunks in parts.items()}
        obs = {name.removeprefix("obs."): named.pop(name) for name in list(named) if name.startswith("obs.")}
        start, stored = (
            None if state is None else {k: v.chunk(count)[i] for k, v in state.items()}
            for state in (batch.start, batch.stored)
        )
        known = None if batch.known is None else batch.known.chunk(count)[i]
        ids = batch.ids[i * size : (i + 1) * size]
        out.append(Batch(obs=obs, ids=ids, start=start, stored=stored, known=known, **named))
    return out


def tensors(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach() for p in module.parameters()]


def under(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors below a name, without it."""
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
