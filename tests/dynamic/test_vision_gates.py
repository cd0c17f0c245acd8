"""Gates beside the dense model with what they did not choose masked: the same to 1e-5, and the time and batches that follow."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dynamic_cases import bert, convolutional, outputs, pictures, sentences, tokens
from torch import nn

import secateur as sc
from secateur.dynamic.channels import ChannelGate, GatedInput, Link
from secateur.dynamic.early_exit import pooled
from secateur.dynamic.skip import SkipGate
from secateur.errors import BudgetError, ModelError, RecipeError

RNP = {"epochs": 0, "episodes": 24, "steps": 10, "hidden": 4}


@pytest.fixture(scope="module")
def rnp():
    return sc.dynamic(convolutional(), method="rnp", data=pictures(), budget=0.5, **RNP)


class ByWidth(nn.Module):
    """Member by member, the norm of as many groups as it chose."""

    def __init__(self, norms, chosen):
        super().__init__()
        self.norms, self.chosen = norms, chosen

    def forward(self, x):
        return torch.cat([self.norms[k](one[None]) for k, one in zip(self.chosen.tolist(), x, strict=True)])


def masked_dense(gated, x, widths):
    """The gated model's dense convolutions, with channels behind the chosen ones set to zero before they are read."""
    dense = convolutional()
    gates = [m for m in gated.modules() if isinstance(m, ChannelGate)]
    readers = [m for m in gated.modules() if isinstance(m, GatedInput)]
    for block, gate, reader, width in zip(dense[1], gates, readers, widths, strict=True):
        block.conv1.load_state_dict(gate.conv.state_dict())
        block.bn1.load_state_dict(gate.norm.state_dict())
        block.conv2.load_state_dict(reader.conv.state_dict())
        block.bn2 = ByWidth(reader.norms, torch.as_tensor(width) // 2)
        keep = torch.arange(8) < torch.as_tensor(width)[:, None]
        block.conv2.register_forward_pre_hook(lambda m, args, keep=keep: (args[0] * keep[:, :, None, None],))
    with torch.no_grad():
        return dense(x)


def decider_of(gated):
    return next(m for m in gated.modules() if isinstance(m, ChannelGate)).decider


def choices(gated, x):
    decider = decider_of(gated)
    decider.trace = []
    y = outputs(gated, x)
    chosen = [c * 2 for _, c in decider.trace]
    decider.trace = None
    return y, chosen


def test_rnp_is_the_dense_network_with_the_other_channels_masked(rnp):
    decider, x = decider_of(rnp), torch.cat([batch[0] for batch in pictures()])
    generator = torch.Generator().manual_seed(3)
    decider.explore, decider.epsilon = generator, 0.7  # choices of all kinds, from none to all
    y, widths = choices(rnp, x)
    decider.explore, decider.epsilon = None, 0.0
    assert set(torch.cat(widths).tolist()) == {0, 2, 4, 6, 8}
    torch.testing.assert_close(y, masked_dense(rnp, x, widths), rtol=1e-5, atol=1e-5)


def test_rnp_alone_is_as_in_a_batch_of_different_choices(rnp):
    x = torch.cat([batch[0] for batch in pictures()])
    together, widths = choices(rnp, x)
    assert any(len(w.unique()) > 1 for w in widths)
    torch.testing.assert_close(together, torch.cat([outputs(rnp, one[None]) for one in x]), rtol=1e-5, atol=1e-5)


def test_rnp_computes_only_what_it_chose(rnp):
    """What the convolutions are given at batch 1 is as narrow as was chosen."""
    seen = []
    hooks = [
        m.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1])) for m in rnp.modules() if isinstance(m, GatedInput)
    ]
    for one in pictures()[0][0]:
        outputs(rnp, one[None])
    for hook in hooks:
        hook.remove()
    assert min(seen) < 8
    assert set(seen) <= {0, 2, 4, 6, 8}
    with rnp.recording() as costs:
        for batch in pictures():
            outputs(rnp, batch)
    assert costs.mean <= 0.5 + 1e-6


def test_rnp_trains_the_network_and_keeps_what_was_pruned():
    model = convolutional()
    with torch.no_grad():
        model[1][0].conv1.weight[:, ::2] = 0
    gated = sc.dynamic(model, method="rnp", data=pictures(), budget=0.8, **{**RNP, "epochs": 2, "lr": 0.01})
    first = next(m for m in gated.modules() if isinstance(m, ChannelGate))
    assert int((first.conv.weight == 0).sum()) >= 8 * 4 * 9
    dense = convolutional()
    assert not torch.equal(gated.model[4].weight, dense[4].weight)


def test_rnp_has_a_norm_for_each_number_of_groups(rnp):
    assert rnp.options["norms"] == [f"1.{i}.bn2" for i in range(4)]
    block, x = convolutional()[1][0], torch.randn(9, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    widths = torch.tensor([0, 8, 2, 8, 2, 2, 8, 0, 8])
    gate = GatedInput(block.conv2, Link(widths), block.bn2, groups=4).train()
    y = gate(x)
    for k in (0, 1, 4):
        rows, norm = widths == 2 * k, copy.deepcopy(block.bn2).train()
        masked = x[rows] * (torch.arange(8) < 2 * k)[:, None, None]
        torch.testing.assert_close(y[rows], norm(block.conv2(masked)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gate.norms[k].running_var, norm.running_var)
    assert torch.equal(gate.norms[3].running_var, block.bn2.running_var)


def test_rnp_leaves_a_norm_alone_that_is_not_behind_the_second_convolution():
    class Late(nn.Module):
        """The output of the second convolution is read before the norm, too."""

        def __init__(self):
            super().__init__()
            self.a, self.n, self.b, self.m = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)

        def forward(self, x):
            y = self.b(torch.relu(self.n(self.a(x))))
            return (self.m(y) + y).mean((2, 3))

    gated = sc.dynamic(Late(), method="rnp", data=pictures(), **RNP)
    assert gated.options["norms"] == []
    assert type(gated.model.m) is nn.BatchNorm2d


def test_rnp_says_what_it_cannot_do():
    with pytest.raises(ModelError, match="pairs of convolutions"):
        sc.dynamic(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), method="rnp", data=pictures())
    with pytest.raises(RecipeError, match="groups=1"):
        sc.dynamic(convolutional(), method="rnp", data=pictures(), groups=1)

    class Shared(nn.Module):
        """The channels between the two convolutions are read by a third."""

        def __init__(self):
            super().__init__()
            self.a, self.n, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            y = self.n(self.a(x))
            return self.b(y).mean((2, 3)) + y.mean((1, 2, 3))[:, None]

    with pytest.raises(ModelError, match="read by others"):
        sc.dynamic(Shared(), method="rnp", data=pictures(), **RNP)


def test_an_early_exit_says_what_its_head_says_and_ends_there():
    gated = sc.dynamic(convolutional(), method="early_exit", data=pictures(), budget=1.0, exits=2, steps=30)
    inner, x = gated.model, torch.cat([batch[0] for batch in pictures()])
    dense, calls = outputs(convolutional(), x), []
    with torch.no_grad():
        hidden, logits = x, []
        for name in ("0", "1.0", "1.1", "1.2", "1.3"):
            hidden = inner.model.get_submodule(name)(hidden)
            if name in inner.places:
                logits.append(inner.heads[len(logits)](pooled(hidden)))
    sure = [inner.confidence(i, own) for i, own in enumerate(logits)]
    inner.threshold = float(sure[0].median())
    at = torch.where(sure[0] >= inner.threshold, 0, torch.where(sure[1] >= inner.threshold, 1, 2))
    assert len(at.unique()) >= 2
    wanted = torch.stack([*logits, dense])[at, torch.arange(len(x))]
    torch.testing.assert_close(outputs(gated, x), wanted, rtol=1e-5, atol=1e-5)
    hook = inner.model[1][3].register_forward_pre_hook(lambda m, a: calls.append(len(a[0])))
    leaves = int((at == 0).nonzero()[0])
    with gated.recording() as costs:
        outputs(gated, x[leaves : leaves + 1])
    hook.remove()
    assert calls == []
    assert float(costs.computed) == float(inner.costs[0])


def test_skipping_is_bypassing():
    gated = sc.dynamic(convolutional(), method="skip", data=pictures(), budget=0.6)
    gates, x = [m for m in gated.modules() if isinstance(m, SkipGate)], torch.cat([batch[0] for batch in pictures()])
    hidden, skipped = torch.nn.functional.conv2d(x, gated.model[0].weight, gated.model[0].bias, padding=1), 0
    with torch.no_grad():
        for gate in gates:
            needed = gate.importance(hidden) >= gate.threshold
            skipped += int((~needed).sum())
            hidden = torch.where(needed[:, None, None, None], gate.block(hidden), hidden)
        wanted = gated.model[4](hidden.mean((2, 3)))
    assert 0 < skipped < len(x) * len(gates)
    torch.testing.assert_close(outputs(gated, x), wanted, rtol=1e-5, atol=1e-5)


def test_dropped_tokens_are_gone_and_come_back_behind_the_last_block():
    gated = sc.dynamic(bert(), method="tokens", data=sentences(), budget=0.7, score="mean")
    lengths, batch = [], sentences()[0]
    layers = gated.model.encoder.layer
    hooks = [m.block.register_forward_pre_hook(lambda m, a: lengths.append(a[0].shape[1])) for m in layers]
    found = outputs(gated, batch)
    for hook in hooks:
        hook.remove()
    assert lengths[0] == 16
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 12
    assert found.shape == outputs(bert(), batch).shape


def test_tokens_are_the_dense_layers_on_the_tokens_that_stay():
    """One place, by hand: attention received is computed from the layer's own projections."""
    model, batch = bert(), sentences()[0]
    gated = sc.dynamic(model, method="tokens", data=sentences(), budget=0.8, score="cls", places=1)
    rate = gated.model.encoder.layer[0].route.rate
    layers = model.encoder.layer
    with torch.no_grad():
        x = model.embeddings(batch["input_ids"])
        for layer in layers[:2]:
            x = layer(x)
        attention = layers[2].attention.self
        q, k = (proj(x).view(3, 16, 4, 8).transpose(1, 2) for proj in (attention.query, attention.key))
        received = (q[:, :, :1] @ k.transpose(-1, -2) / 8**0.5).softmax(-1).mean(1)[:, 0]
        x = layers[2](x)
        keep = -int(-16 * rate // 1)
        rows = []
        for row, score in zip(x, received, strict=True):
            order = score[1:].argsort(descending=True) + 1
            stay, go = order[: keep - 1], order[keep - 1 :]
            fused = (score[go, None] * row[go]).sum(0) / score[go].sum()
            y = torch.cat([row[:1], row[stay], fused[None]])[None]
            for layer in layers[3:]:
                y = layer(y)
            full = row.clone()
            full[0], full[stay] = y[0, 0], y[0, 1:keep]
            rows.append(full)
    torch.testing.assert_close(outputs(gated, batch), torch.stack(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["tokens", "skip"])
def test_padding_changes_nothing(method):
    gated = sc.dynamic(bert(), method=method, data=sentences(), budget=0.6)
    batch = tokens()[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 11:], mask[1, 5:] = 0, 0
    padded = outputs(gated, {**batch, "attention_mask": mask})
    for row, length in enumerate((11, 5, 16)):
        one = {"input_ids": batch["input_ids"][row : row + 1, :length], "attention_mask": mask[row : row + 1, :length]}
        torch.testing.assert_close(padded[row, :length], outputs(gated, one)[0], rtol=1e-4, atol=1e-5)


def test_a_member_that_is_all_padding_is_refused():
    gated = sc.dynamic(bert(), method="tokens", data=sentences(), budget=0.8)
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(ModelError, match="all padding"):
        outputs(gated, {"input_ids": tokens()[0]["input_ids"], "attention_mask": mask})


def test_a_budget_below_the_least_possible_is_refused_and_named():
    gated = sc.dynamic(convolutional(), method="early_exit", data=pictures(), budget=1.0, exits=1, steps=5)
    with pytest.raises(BudgetError, match="nearest that can"):
        gated.budget = 0.01
    assert gated.budget == 1.0


def test_saved_and_loaded_in_a_fresh_process_to_the_same_bits(rnp, tmp_path):
    sc.save(rnp, tmp_path / "gated")
    x = pictures()[0][0]
    torch.save(x, tmp_path / "x.pt")
    code = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parents[1])!r}]
import torch, secateur as sc
from dynamic_cases import convolutional
torch.set_num_threads({torch.get_num_threads()})
gated = sc.load({str(tmp_path / "gated")!r}, model=convolutional()).eval()
with torch.no_grad():
    torch.save(gated(torch.load({str(tmp_path / "x.pt")!r})), {str(tmp_path / "y.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "y.pt"), outputs(rnp, x))
