"""Padding and image positions in the statistics of models that read both: against the sums over what is no padding."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from vision_language_models import NAMES, make

import secateur as sc
from secateur.data.batches import Batches
from secateur.layers import find_layers
from secateur.patterns import make_pattern
from secateur.select import removed_count
from secateur.stats import collect
from secateur.stats.blocks import inputs_in_turn
from secateur.structured import cut_units, prepare_units
from secateur.types import Need
from secateur.vision_language.groups import modality_groups


class Joined(nn.Module):
    """Pixels and tokens in one row, in either order, with a token of the model's own in front."""

    def __init__(self, images_first: bool):
        super().__init__()
        self.patches, self.words = nn.Conv2d(3, 4, 2, 2), nn.Embedding(9, 4)
        self.see, self.read, self.join = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.start = nn.Parameter(torch.randn(1, 1, 4))
        self.images_first = images_first

    def forward(self, input_ids, attention_mask, pixel_values):
        seen = self.see(self.patches(pixel_values).flatten(2).transpose(1, 2))
        read = self.read(self.words(input_ids))
        row = [self.start.expand(len(seen), -1, -1), *((seen, read) if self.images_first else (read, seen))]
        return self.join(torch.cat(row, 1))


@pytest.mark.parametrize("images_first", [True, False])
@pytest.mark.parametrize("tokens", [4, 5])  # 4: as many as image positions, which the mask must not be taken for
def test_padding_is_left_out_where_tokens_stand_among_image_positions(images_first, tokens):
    model = Joined(images_first)
    mask = torch.ones(3, tokens, dtype=torch.long)
    mask[1, -2:] = 0
    one = {"input_ids": torch.randint(9, (3, tokens)), "attention_mask": mask, "pixel_values": torch.randn(3, 3, 4, 4)}
    layers = find_layers(model)[0]
    found = collect(model, layers, {Need.INPUT_NORM, Need.GRAM}, batches=Batches([one]))
    inputs: dict[str, torch.Tensor] = {}
    for name in ("see", "read", "join"):
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: inputs.__setitem__(name, a[0].detach()))
    model(**one)
    keep = mask.bool()
    all_seen, start = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 1, dtype=torch.bool)
    row = torch.cat([start, all_seen, keep] if images_first else [start, keep, all_seen], 1)
    for name, kept in (("see", all_seen), ("read", keep), ("join", row)):
        rows = inputs[name][kept]
        stats = found.layers[f"{name}.weight"]
        torch.testing.assert_close(stats.input_norm[0], rows.norm(dim=0))
        torch.testing.assert_close(stats.gram[0], rows.t() @ rows)
    assert found.notes == ()


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_padding_only_at_their_ends_count_like_samples_without(name):
    """A padded sample gives its own layers' statistics whether its padding is there or was never added."""
    model, one = make(name)
    ignore = ["vision_proj", "text_proj"] if name == "blip" else []
    layers = {n: la for n, la in find_layers(model, ignore=ignore)[0].items() if not n.endswith("vision_model.head.mlp")}
    last = {k: v[2:] for k, v in one.items()}
    cut = {k: v[:, :-2] if v.dim() == 2 else v for k, v in last.items()}
    if name == "siglip":  # it was trained on padding and pools the last position, whatever the mask says
        layers = {n: la for n, la in layers.items() if n.startswith("vision_model")}
    padded = collect(model, layers, {Need.INPUT_NORM}, batches=Batches([last]))
    short = collect(model, layers, {Need.INPUT_NORM}, batches=Batches([cut]))
    assert not [n for n in padded.notes if "padding" in n]
    for layer in layers:
        torch.testing.assert_close(padded.layers[layer].input_norm, short.layers[layer].input_norm, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "llava"])
def test_blocks_that_are_replayed_have_the_same_matrices_as_one_pass(name):
    model, one = make(name)
    layers, _ = find_layers(model)
    turns = list(inputs_in_turn(model, layers, Batches([one])))
    found = {n: g for part in turns for n, g in part.items()}
    whole = collect(model, layers, {Need.GRAM}, batches=Batches([one])).layers
    assert set(found) == set(layers)
    for layer in layers:
        torch.testing.assert_close(found[layer], whole[layer].gram, rtol=1e-4, atol=1e-4)


METHODS = {
    "multiflow": {"criterion": "multiflow", "allocation": "magnitude"},
    "omp": {"criterion": "magnitude"},
    "lamp": {"criterion": "magnitude", "allocation": "lamp"},
    "snip": {"criterion": "snip"},
    "iterative snip": {"criterion": "snip", "schedule": "exponential", "steps": 3},
    "chita": {"solver": "chita"},
    "chita++": {"solver": "chita", "schedule": {"name": "cubic", "initial": 0.3}, "steps": 3},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_baseline_runs_within_modalities_by_the_same_call(method, monkeypatch):
    untimed = lambda model, pruned, example, before, after: (before, after)  # noqa: E731
    monkeypatch.setattr(importlib.import_module("secateur.prune"), "_timed_side_by_side", untimed)
    model, one = make("clip")
    result = sc.prune(model, sparsity=0.75, groups="modality", data=[{**one, "return_loss": True}], **METHODS[method])
    for names in modality_groups(model, list(result.masks), one).values():
        total = sum(result.masks[n].numel() for n in names)
        assert sum(int((~result.masks[n]).sum()) for n in names) == removed_count(total, 0.75)


def test_units_are_repaired_on_what_is_no_padding():
    """Padded tokens of any value change nothing of a refit: neither of the tower of pixels nor of the joined row."""
    torch.manual_seed(0)
    model = Joined(True)
    model.join = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    mask = torch.ones(3, 4, dtype=torch.long)  # as many tokens as image positions
    mask[1, -2:] = 0
    one = {"input_ids": torch.randint(8, (3, 4)), "attention_mask": mask, "pixel_values": torch.randn(3, 3, 4, 4)}
    other = {**one, "input_ids": one["input_ids"].masked_fill(mask == 0, 8)}
    recipe = {"pattern": "ffn", "sparsity": 0.5, "repair": "least-squares", "ignore": ["see", "read", "patches"]}
    found = []
    for data in (one, other):
        job = prepare_units(model, sc.Recipe.make(recipe), make_pattern("ffn"), data=[data], train=None, loss=None, example=one)
        found.append(cut_units(model, job).model)
    for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
