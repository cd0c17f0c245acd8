"""Teaching the decision network: episodes of the gated network are kept and replayed, and Q-values fit what followed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from secateur.data.batches import Batch, forward, labels_of, output_tensor, size_of
from secateur.dynamic.decider import Decider
from secateur.errors import DataError
from secateur.progress import track

_LAMBDA = 0.9  #: how far what really followed counts, and how far the estimate of it
_BATCH = 256


@dataclass(frozen=True)
class Episodes:
    """What was seen, done and got: for each gate pooled features ``[n, channels]`` and choices ``[n]``; the end's reward."""

    pooled: Sequence[Tensor]
    chosen: Tensor  #: ``[gates, n]``
    price: Tensor  #: ``[n]``
    reward: Tensor  #: ``[n]``: minus how much the loss is above that of the dense network

    def pick(self, which: Tensor) -> Episodes:
        """Some of them."""
        return Episodes([p[which] for p in self.pooled], self.chosen[:, which], self.price[which], self.reward[which])


@torch.no_grad()
def play(model: nn.Module, decider: Decider, batches: Sequence[Batch], epsilon: float, seed: int) -> Episodes:
    """Run the batches, at prices drawn for each input and with `epsilon` of the choices at random.

    The reward is the loss of the dense network minus that of the gated one: the first does not depend on what was chosen, so
    the best choices are the same as by the loss alone, and the noise is much less.
    """
    generator = Generator().manual_seed(seed)
    seen: list[Episodes] = []
    decider.explore, decider.epsilon = generator, epsilon
    try:
        for batch in track(batches, "episodes", len(batches)):
            decider.full = True
            dense = losses(model, batch)
            decider.full, decider.trace = False, []
            decider.price = decider.any_price(size_of(batch), generator).to(dense.device)
            reward = dense - losses(model, batch)
            pooled, chosen = zip(*decider.trace, strict=True)
            seen.append(Episodes(pooled, torch.stack(chosen), decider.price, reward))
    finally:
        decider.explore, decider.trace, decider.epsilon = None, None, 0.0
    return join(seen)


def join(parts: Sequence[Episodes]) -> Episodes:
    """All episodes of several lists."""
    pooled = [torch.cat(p) for p in zip(*(part.pooled for part in parts), strict=True)]
    chosen, price, reward = (torch.cat([getattr(p, name) for p in parts], -1) for name in ("chosen", "price", "reward"))
    return Episodes(pooled, chosen, price, reward)


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each input ``[batch]``. DataError for a batch without class labels."""
    labels = labels_of(batch)
    if labels is None or labels.is_floating_point():
        raise DataError("rnp learns from class labels: give batches of (inputs, labels)")
    logits = output_tensor(forward(model, batch))
    return F.cross_entropy(logits.float(), labels.to(logits.device), reduction="none")


def learn(decider: Decider, replay: Episodes, steps: int, lr: float, seed: int) -> float:
    """Fit the Q-values to the replayed episodes; returns the mean squared error over the last tenth of the steps.

    The target of a step is what came after it: its reward and, half and half by `_LAMBDA`, what the episode then really got
    and the best value that a slowly following copy of the network sees in the next state (Peng's Q(lambda)).
    """
    generator = Generator().manual_seed(seed)
    slow = copy.deepcopy(decider)
    optimizer = torch.optim.Adam(decider.parameters(), lr=lr)
    errors = []
    with torch.enable_grad():
        for step in track(range(steps), "Q-learning", steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, 2 * (1 - step / steps))
            part = replay.pick(torch.randint(len(replay.price), (_BATCH,), generator=generator).to(replay.price.device))
            values = all_values(decider, part)
            with torch.no_grad():
                targets = _targets(decider, all_values(slow, part), part)
            taken = values.gather(2, part.chosen[..., None])[..., 0]
            error = F.smooth_l1_loss(taken, targets)
            optimizer.zero_grad()
            error.backward()
            nn.utils.clip_grad_norm_(decider.parameters(), 1.0)
            optimizer.step()
            errors.append(float(error.detach()))
            with torch.no_grad():
                for old, new in zip(slow.parameters(), decider.parameters(), strict=True):
                    old.lerp_(new, 0.02)
    last = errors[-max(1, steps // 10) :]
    return sum(last) / len(last)


def all_values(decider: Decider, part: Episodes) -> Tensor:
    """``[gates, n, groups + 1]``."""
    return torch.stack([decider.values(gate, pooled, part.price) for gate, pooled in enumerate(part.pooled)])


def _targets(decider: Decider, values: Tensor, part: Episodes) -> Tensor:
    """``[gates, n]``, from the last gate to the first; nothing is paid at the end but the loss."""
    gates = len(values)
    paid = part.price * decider.shares[:, None] * part.chosen / decider.groups
    targets = torch.empty_like(values[..., 0])
    after = part.reward.to(values.dtype)
    for gate in reversed(range(gates)):
        targets[gate] = after - paid[gate].to(values.dtype)
        after = _LAMBDA * targets[gate] + (1 - _LAMBDA) * values[gate].max(1).values
    return targets
