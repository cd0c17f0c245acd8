"""DejaVu: small predictors say, from an earlier hidden state, which neurons and heads this input will need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data.batches import Batches
from secateur.dynamic.blocks import block_lists, positions, recorded, run_all
from secateur.dynamic.chosen import Choice, ChosenInputs, ChosenOutputs
from secateur.dynamic.gate import Gate
from secateur.dynamic.parts import Part, attention, feed_forward
from secateur.dynamic.registry import DYNAMIC
from secateur.errors import ModelError, RecipeError
from secateur.layers import find_layers
from secateur.progress import track
from secateur.stats.replay import Call, phase

_BATCH = 256  #: positions in one step of training


class Predictor(nn.Module):
    """``d -> r -> units``: one score a unit, from a hidden state scaled to unit mean square. Two matrices, kept as buffers."""

    down: Tensor  #: ``[r, d]``
    up: Tensor  #: ``[units, r]``
    offset: Tensor  #: ``[units]``; minus infinity for units that are pruned

    def __init__(self, width: int, rank: int, units: int):
        super().__init__()
        self.register_buffer("down", torch.zeros(rank, width))
        self.register_buffer("up", torch.zeros(units, rank))
        self.register_buffer("offset", torch.zeros(units))

    @property
    def macs(self) -> int:
        """Multiply-adds for one position."""
        return self.down.numel() + self.up.numel()

    @property
    def alive(self) -> int:
        """Units that are not pruned."""
        return int((self.offset > -torch.inf).sum())

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., d] -> [..., units]``; higher = more likely to be needed."""
        return F.linear(F.linear(scaled(hidden.to(self.down.dtype)), self.down), self.up, self.offset)


class Chooser(Gate):
    """Chooses the neurons and heads of one block, by the hidden state that goes into the block `ahead` before it.

    The same number for every position, so that costs are known beforehand. At budget 1 nothing is predicted.
    """

    def __init__(self, width: int, rank: int, neurons: Choice | None, heads: Choice | None, dense: int, of_heads: float):
        """`dense` multiply-adds a position in the parts that follow the choices; `of_heads` as `DejaVu.heads`."""
        super().__init__()
        self.neurons, self.heads, self.dense, self.of_heads = neurons, heads, dense, of_heads
        self.for_neurons = Predictor(width, rank, neurons.units) if neurons else None
        self.for_heads = Predictor(width, min(rank, 32), heads.units) if heads else None
        self.fractions = (0.0, 0.0)  #: multiply-adds in the parts of neurons and heads, of all gated ones
        self.counts: tuple[int, int] | None = None

    @property
    def predictors(self) -> list[tuple[Choice, Predictor]]:
        """Each choice with the predictor that makes it."""
        both = ((self.neurons, self.for_neurons), (self.heads, self.for_heads))
        return [(c, p) for c, p in both if c is not None and p is not None]

    def set_budget(self, budget: float) -> None:
        """As many neurons and heads as the budget leaves after the predictors' own cost."""
        if budget == 1:
            self.counts = None
            return
        neurons = self.neurons.units if self.neurons else 0
        heads = self.heads.units if self.heads else 0
        predicting = sum(p.macs for _, p in self.predictors) / self.dense
        skipped = (1 - budget + predicting) / (self.fractions[0] + self.of_heads * self.fractions[1])
        rounded = math.floor if neurons == 0 else round
        kept_heads = rounded((1 - self.of_heads * skipped) * heads + 1e-9)
        left = budget - predicting - (self.fractions[1] * kept_heads / heads if heads else 0.0)
        kept_neurons = math.floor(left / self.fractions[0] * neurons + 1e-9) if neurons else 0
        if (heads and kept_heads < 1) or (neurons and kept_neurons < 1):
            raise RecipeError(
                f"the budget {budget} cannot be met: the predictors themselves cost {predicting:.1%} of the multiply-adds they "
                "decide on, and one neuron and one head are always computed. Ask for more, or take a smaller rank."
            )
        self.counts = (
            min(kept_neurons, self.for_neurons.alive if self.for_neurons else 0),
            min(kept_heads, self.for_heads.alive if self.for_heads else 0),
        )

    def look(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before an earlier block runs: choose for this one. A forward pre-hook."""
        hidden = args[0] if args else next(iter(kwargs.values()))
        if self.counts is not None:
            for choice, predictor in self.predictors:
                count = self.counts[0 if choice is self.neurons else 1]
                everything = count >= choice.units
                choice.chosen = None if everything else predictor(hidden).topk(count, sorted=False).indices
        else:
            for choice, _ in self.predictors:
                choice.chosen = None
        if self.meter is not None:
            batch = len(hidden)
            spent = sum(p.macs for _, p in self.predictors) if self.counts is not None else 0
            cost = torch.full((batch,), float(spent * (hidden.shape[:-1].numel() // batch)), dtype=torch.float64)
            self.spend(cost, torch.zeros_like(cost))


@DYNAMIC.register("dejavu", source="Liu et al. 2023, Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time")
@dataclass(frozen=True, kw_only=True)
class DejaVu:
    """Predictors ``d -> rank -> units`` choose the feed-forward neurons and attention heads that a position computes.

    A predictor reads the hidden state that goes into the block before its own (`ahead` = 1; 0 reads its own), so that it could
    run beside that block. It is trained by weighted binary cross-entropy (Adam, `steps` steps) on the units that
    mattered most on the calibration data: a share of `active` neurons by magnitude times the norm of the weights that
    read them, as many heads by the norm of what they add. Positives weigh by what they add. Heads lose `heads` times the
    share that neurons lose. Keys and values are always computed: later positions need them.

    Departures: the paper's units are exactly zero without being computed (ReLU), here small ones are left out, so that gated
    activations (SwiGLU) are served; the same number of units is chosen at every position. `rank` 0 is an eighth of the width.
    """

    rank: int = 0
    ahead: int = 1
    heads: float = 0.5
    active: float = 0.4
    steps: int = 300
    lr: float = 0.003
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"rank": (0, 65536), "ahead": (0, 1), "heads": (0, 1), "active": (0.01, 0.99), "steps": (1, 10**6)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise RecipeError(f"dejavu: {name}={getattr(self, name)!r} is out of range: {low} to {high}")

    def attach(self, model: nn.Module) -> nn.Module:
        """A `Chooser` in every block that has a feed-forward part or heads, and gates around the layers of these."""
        for names in block_lists(model):
            parts = [(feed_forward(model, name), attention(model, name)) for name in names]
            for index, (name, both) in enumerate(zip(names, parts, strict=True)):
                if any(both):
                    chooser = self._chooser(model, *both)
                    model.get_submodule(name).add_module("chooser", chooser)
                    earlier = model.get_submodule(names[max(0, index - self.ahead)])
                    earlier.register_forward_pre_hook(chooser.look, with_kwargs=True)
        return model

    def _chooser(self, model: nn.Module, neurons: Part | None, heads: Part | None) -> Chooser:
        macs, choices, width = [0, 0], [], 0
        for which, part in enumerate((neurons, heads)):
            choice = Choice(part.units, part.size) if part else None
            choices.append(choice)
            if part is None or choice is None:
                continue
            layers = find_layers(model)[0]
            for name in (*part.before, part.after):
                layer = layers[name]
                kind = ChosenInputs if name == part.after else ChosenOutputs
                model.set_submodule(layer.module_name, kind(layer.module, choice, swap=layer.swap))
                macs[which] += layer.parameter.numel()
            width = layers[part.after].shape[0]
        rank = self.rank or max(1, width // 8)
        chooser = Chooser(width, rank, choices[0], choices[1], sum(macs), self.heads if neurons else 1.0)
        chooser.fractions = (macs[0] / sum(macs), macs[1] / sum(macs))
        return chooser

    def calibrate(self, model: nn.Module, data: Batches) -> None:
        """Train the predictors of one block after the other on the dense model's hidden states."""
        for names in block_lists(model):
            calls = recorded(model, names, data)
            earlier: Tensor | None = None
            for name in track(names, "blocks", len(names)):
                block = model.get_submodule(name)
                chooser = block._modules.get("chooser")
                with phase(model, 0):
                    hidden = torch.cat([positions(call.hidden, call.mask) for call in calls])
                    outputs, importance = _importance(block, chooser if isinstance(chooser, Chooser) else None, calls)
                source = hidden if earlier is None or not self.ahead else earlier
                if isinstance(chooser, Chooser):
                    for (choice, predictor), worth in zip(chooser.predictors, importance, strict=True):
                        self._train(predictor, source, worth, choice)
                        predictor.offset.masked_fill_(_pruned(block, choice).to(predictor.offset.device), -torch.inf)
                earlier = hidden
                for call, output in zip(calls, outputs, strict=True):
                    call.proceed(output)

    def _train(self, predictor: Predictor, hidden: Tensor, worth: Tensor, choice: Choice) -> None:
        """Weighted cross-entropy between the scores and membership in the top `active` of ``worth [positions, units]``."""
        top = max(1, round(self.active * choice.units))
        generator = torch.Generator().manual_seed(self.seed)
        width, rank = predictor.down.shape[1], predictor.down.shape[0]
        x = scaled(hidden.float())
        down = (torch.randn(rank, width, generator=generator) / width**0.5).to(x.device).requires_grad_()
        up = torch.zeros(choice.units, rank, device=x.device, requires_grad=True)
        labels = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, worth.topk(top).indices, True)
        weights = torch.where(labels, worth / worth[labels].mean().clamp(min=1e-12), torch.ones_like(worth))
        offset = torch.logit(labels.float().mean(0).clamp(0.01, 0.99)).requires_grad_()
        optimizer = torch.optim.Adam([down, up, offset], lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        with torch.enable_grad():
            for _ in range(self.steps):
                rows = torch.randint(len(x), (min(_BATCH, len(x)),), generator=generator).to(x.device)
                logits = F.linear(F.linear(x[rows], down), up, offset)
                loss = F.binary_cross_entropy_with_logits(logits, labels[rows].float(), weights[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            for buffer, trained in ((predictor.down, down), (predictor.up, up), (predictor.offset, offset)):
                buffer.copy_(trained)


def _pruned(block: nn.Module, choice: Choice) -> Tensor:
    """Bool ``[units]``: units that nothing reads, and neurons that have no weights and no bias and so are zero."""
    found = torch.zeros(choice.units, dtype=torch.bool)
    for gate in block.modules():
        if isinstance(gate, ChosenInputs) and gate.choice is choice:
            found |= (gate.by_input == 0).all(1).unflatten(0, (choice.units, choice.size)).all(1).cpu()
        elif isinstance(gate, ChosenOutputs) and gate.choice is choice and choice.size == 1:
            empty = (gate.by_output == 0).all(1)
            found |= (empty if gate.bias is None else empty & (gate.bias == 0)).cpu()
    return found


def scaled(hidden: Tensor) -> Tensor:
    """Hidden states with a mean square of 1."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)


def _importance(block: nn.Module, chooser: Chooser | None, calls: Sequence[Call]) -> tuple[list[Tensor], list[Tensor]]:
    """The block's outputs on all calls, and for each predictor what every unit added: ``[positions, units]``."""
    readers = [m for m in block.modules() if isinstance(m, ChosenInputs)]
    order = [next(r for r in readers if r.choice is choice) for choice, _ in chooser.predictors] if chooser else []
    seen: dict[nn.Module, list[Tensor]] = {reader: [] for reader in order}
    grams = {reader: _gram(reader) for reader in order}

    def see(reader: ChosenInputs, x: Tensor) -> None:
        x = x.float().unflatten(-1, (-1, reader.choice.size))
        seen[reader].append(torch.einsum("nud,ude,nue->nu", x, grams[reader], x).clamp(min=0).sqrt())

    outputs = run_all(block, calls, order, see)
    if not all(seen.values()):
        raise ModelError("the data reaches no call of a feed-forward or attention part: what its units add is unknown")
    return outputs, [torch.cat(seen[reader]) for reader in order]


def _gram(reader: ChosenInputs) -> Tensor:
    """``[units, size, size]``: products of the columns that read a unit, so that norms of what it adds need no outputs."""
    columns = reader.by_input.detach().float().unflatten(0, (-1, reader.choice.size))
    return columns @ columns.transpose(1, 2)
