"""Runtime Neural Pruning: at each convolution a decision network says how many groups of channels this image needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.batches import Batch, Batches, first_batches, forward, output_tensor, samples_of
from secateur.dynamic.channels import ChannelGate, Found, GatedInput, Link, find_pairs, order_channels
from secateur.dynamic.decider import ENDS, Decider
from secateur.dynamic.gate import recording
from secateur.dynamic.q_learning import join, learn, play
from secateur.dynamic.registry import DYNAMIC
from secateur.errors import ModelError, RecipeError
from secateur.stats.replay import hooked
from secateur.train.finetune import finetune
from secateur.types import MaskSet


@DYNAMIC.register("rnp", source="Lin et al. 2017, Runtime Neural Pruning, sections 3.1 to 3.3")
@dataclass(frozen=True, kw_only=True)
class Rnp:
    """Channel groups chosen by a Markov decision process, learnt by Q-learning; the price of a group is the dial.

    In every pair of convolutions inside a block (with a BatchNorm between them) the channels that pass from one to the
    other are split into `groups`; a decision network sees the pooled features and computes the first k of them, in both
    convolutions. A BatchNorm behind the second is there once for each k. The network is trained for one epoch with its
    gates at random (SGD, cross-entropy), and then in turns: the decision network learns by Q-learning with replay from
    `episodes` inputs that are played epsilon-greedily, and the network is trained for an epoch with its gates as decided,
    one of ten at random, at prices of budgets from `lowest` to 1. The data must be batches of (inputs, labels).

    Departures: k may be 0, and the block is then its shortcut alone; channels are put in the order of their weights first;
    the price is an input of the decision network, so that one network serves all budgets; the reward is counted from the
    dense network's loss on the same input; returns are Peng's Q(lambda); the norm for each k is that of Slimmable Neural
    Networks (Yu et al. 2018). `norms` are found from the model and its first batch, and may be given instead. Cost:
    `epochs` of training, in between as many rounds of learning to decide, and at run time a decision for each pair.
    """

    groups: int = 4
    epochs: int = 4
    lr: float = 0.05
    weight_decay: float = 5e-4
    hidden: int = 32
    episodes: int = 4096
    steps: int = 500
    lowest: float = 0.3
    seed: int = 0
    norms: Sequence[str] = ()

    def __post_init__(self) -> None:
        least = {"groups": 2, "epochs": 0, "hidden": 1, "episodes": 1, "steps": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise RecipeError(f"rnp: {name}={getattr(self, name)!r} must be at least {low}")
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise RecipeError(f"rnp: lr={self.lr!r} must be more than 0")
        if not 0 < self.lowest < 1:
            raise RecipeError(f"rnp: lowest={self.lowest!r} is out of range: the lowest budget that is trained for, in (0, 1)")

    def prepare(self, model: nn.Module, data: Batches) -> dict[str, Any]:
        """The BatchNorms that read a second convolution which nobody else reads."""
        one = next(iter(samples_of(next(iter(data)))))
        after = [(found.second, found.after) for found in self._pairs(model) if found.after is not None]
        return {"norms": [norm for conv, norm in after if _follows(model, conv, norm, one)]}

    def attach(self, model: nn.Module) -> nn.Module:
        """Both convolutions of every pair become gates, and the BatchNorm between them moves into the first."""
        found = self._pairs(model)
        pairs = [[model.get_submodule(name) for name in (f.first, f.norm, f.second)] for f in found]
        channels: list[Any] = [conv.in_channels for conv, _, _ in pairs]
        decider = Decider(channels, self.groups, self.hidden, self.lowest, self.seed)
        for index, (names, (first, norm, second)) in enumerate(zip(found, pairs, strict=True)):
            link = Link()
            model.set_submodule(names.first, ChannelGate(first, norm, decider, index, link))  # type: ignore[arg-type]
            model.set_submodule(names.norm, nn.Identity())
            after: Any = None
            if names.after is not None and names.after in self.norms:
                after = model.get_submodule(names.after)
                model.set_submodule(names.after, nn.Identity())
            model.set_submodule(names.second, GatedInput(second, link, after, self.groups))  # type: ignore[arg-type]
        return model

    def _pairs(self, model: nn.Module) -> list[Found]:
        if found := find_pairs(model, self.groups):
            return found
        raise ModelError(
            f"rnp gates pairs of convolutions with a BatchNorm between them; a {type(model).__name__} has none whose "
            f"channels split into {self.groups} groups"
        )

    def calibrate(self, model: nn.Module, data: Batches) -> None:
        """Trains the model's own weights too."""
        gates = [m for m in model.modules() if isinstance(m, ChannelGate)]
        readers = [m for m in model.modules() if isinstance(m, GatedInput)]
        decider, first = gates[0].decider, next(iter(data))
        _check_flow(model, gates, first)
        _set_shares(model, gates, readers, first)
        for gate, reader in zip(gates, readers, strict=True):
            order_channels(gate, reader)
        self._train(model, decider, data, 0, 1.0)
        self._decide(model, decider, data, 0)
        for turn in range(1, self.epochs):
            self._train(model, decider, data, turn, 0.1)
            self._decide(model, decider, data, turn)

    def _train(self, model: nn.Module, decider: Decider, data: Batches, turn: int, epsilon: float) -> None:
        """One epoch, at a rate that falls from turn to turn."""
        if turn >= self.epochs:
            return
        decider.full, decider.epsilon = False, epsilon
        masks = MaskSet({n: p != 0 for n, p in model.named_parameters() if p.dim() > 1 and bool((p == 0).any())})
        lr = self.lr * (1 - turn / (self.epochs + 1))
        with frozen(decider), torch.enable_grad(), _lowering(model, decider, len(data) if epsilon == 1 else 0):
            finetune(
                model, data, masks=masks, epochs=1, optimizer="sgd", lr=lr, weight_decay=self.weight_decay, warmup=0.05,
                seed=self.seed + turn,
            )  # fmt: skip
        decider.full, decider.epsilon = True, 0.0
        for module in model.modules():
            if isinstance(module, (ChannelGate, GatedInput)):
                module.train(False)  # what is folded and sliced was made of the old weights

    def _decide(self, model: nn.Module, decider: Decider, data: Batches, turn: int) -> None:
        """Q-learning from episodes that are random at first, and then the decider's own; then the costs of the prices."""
        first, second = (1.0, 0.3) if turn == 0 else (0.3, 0.1)
        seed = self.seed + 1000 * (turn + 1)
        batches = first_batches(data.shuffled(seed), self.episodes)
        half = (len(batches) + 1) // 2
        replay = play(model, decider, batches[:half], first, seed)
        learn(decider, replay, self.steps // 2, 3e-3, seed)
        if batches[half:]:
            replay = join([replay, play(model, decider, batches[half:], second, seed + 1)])
        learn(decider, replay, self.steps - self.steps // 2, 3e-3, seed + 1)
        _measure(model, decider, batches)


@contextmanager
def _lowering(model: nn.Module, decider: Decider, steps: int) -> Iterator[None]:
    """Inside, random choices begin with everything, and reach down to the lowest budget after `steps` calls of the model."""
    calls = 0

    def lower(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += 1
        decider.floor = max(decider.lowest, 1 - (1 - decider.lowest) * calls / steps)

    handles = [model.register_forward_pre_hook(lower)] if steps else []
    try:
        yield
    finally:
        decider.floor = decider.lowest
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of `module` are not trained."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


@torch.no_grad()
def _follows(model: nn.Module, conv: str, norm: str, one: Batch) -> bool:
    """Whether the model stays the same where the norm acts at once on what the convolution puts out, and not later."""
    first, second = model.get_submodule(conv), model.get_submodule(norm)
    dense, at_once = output_tensor(forward(model, one)), second.forward
    handles = [
        first.register_forward_hook(lambda _, args, out: at_once(out)),
        second.register_forward_hook(lambda _, args, out: args[0]),
    ]
    with hooked(handles):
        return torch.equal(output_tensor(forward(model, one)), dense)


@torch.no_grad()
def _check_flow(model: nn.Module, gates: Sequence[ChannelGate], batch: Batch) -> None:
    """Whether the channels of each gate go to its reader alone, and the gates are reached in order: tried with NaN."""
    decider, order = gates[0].decider, list[int]()
    dense = forward(model, batch)
    handles = []
    for gate in gates:

        def poison(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, gate: ChannelGate = gate) -> Tensor:
            order.append(gate.index)
            wide = out.new_full((len(out), gate.conv.out_channels, *out.shape[2:]), torch.nan)
            wide[:, : out.shape[1]] = out
            return wide

        handles.append(gate.register_forward_hook(poison))
    decider.full = False
    try:
        output = forward(model, batch)
    finally:
        decider.full = True
        for handle in handles:
            handle.remove()
    if order != list(range(len(gates))):
        raise ModelError(
            f"rnp: the gates are reached in the order {order}, each must be reached once, as registered in the model"
        )
    if not torch.isfinite(output).all() or not torch.isfinite(dense).all():
        raise ModelError(
            "rnp: the channels between two convolutions of this model are read by others too, so they cannot be gated"
        )


@torch.no_grad()
def _set_shares(model: nn.Module, gates: Sequence[ChannelGate], readers: Sequence[GatedInput], batch: Batch) -> None:
    """Multiply-adds of each pair as a share of all pairs'."""
    macs = dict.fromkeys((*gates, *readers), 0)

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        macs[module] = out.shape[-2:].numel() * module.conv.weight.numel()  # type: ignore[index, union-attr, operator]

    handles = [module.register_forward_hook(count) for module in macs]
    forward(model, batch)
    for handle in handles:
        handle.remove()
    total = torch.tensor([macs[g] + macs[r] for g, r in zip(gates, readers, strict=True)], dtype=torch.float64)
    gates[0].decider.shares.copy_(total / total.sum())


@torch.no_grad()
def _measure(model: nn.Module, decider: Decider, batches: Sequence[Batch]) -> None:
    """The mean share computed at each price, on some of the data; settings of the dial are minus their logarithms."""
    batches = first_batches(batches, 512)

    def cost(setting: float) -> float:
        decider.price = math.exp(-setting)
        with recording(model) as costs:
            for batch in batches:
                forward(model, batch)
        return costs.mean

    decider.full = False
    try:
        decider.dial.measure(-math.log(ENDS[1]), -math.log(ENDS[0]), cost)
    finally:
        decider.full = True
