"""Layers by modality: what is found in small models of four families, and what a recipe makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vision_language_models import NAMES, batch, make

import secateur as sc
from secateur.errors import DataError, RecipeError, UnknownName
from secateur.job import prepare
from secateur.layers import find_layers
from secateur.select import removed_count
from secateur.selection import choose
from secateur.stats.reads import find_reads
from secateur.types import LayerPlan
from secateur.vision_language.groups import collapse_notes, find_groups, modality_groups

EXPECTED = {
    "clip": {"vision": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")},
    "siglip": {"vision": ("vision_model",), "text": ("text_model",)},
    "blip": {"vision": ("vision_model",), "fusion": ("text_encoder", "itm_head"), "other": ("vision_proj", "text_proj")},
    "llava": {
        "vision": ("model.vision_tower", "model.multi_modal_projector"),
        "fusion": ("model.language_model", "lm_head"),
    },
}


def masks_of(model: nn.Module, *, data: list | None = None, **recipe) -> sc.MaskSet:
    """The masks that a recipe of one step chooses, without measuring."""
    job = prepare(model, sc.Recipe.make(recipe), data=data)
    return choose(job.layers, job.statistics(model).layers, sparsity=job.sparsity, method=job.method)


@pytest.mark.parametrize("name", NAMES)
def test_modalities_are_found_from_what_a_layer_reads(name):
    model, one = make(name)
    layers = find_layers(model)[0]
    found = modality_groups(model, layers, one)
    wanted = {g: {n for n in layers if n.startswith(above)} for g, above in EXPECTED[name].items()}
    assert {g: set(n) for g, n in found.items()} == wanted
    assert sum(map(len, found.values())) == len(layers)


def test_modules_of_any_name_are_told_apart_by_what_reaches_them():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.words = nn.Conv2d(3, 4, 2), nn.Linear(4, 4), nn.Linear(8, 2), nn.Embedding(9, 4)

        def forward(self, input_ids, pixel_values):
            seen = self.a(pixel_values).mean((2, 3))
            both = torch.empty(len(seen), 8)
            both[:, :4], both[:, 4:] = seen, self.b(self.words(input_ids)).mean(1)  # writes in place are followed too
            return self.c(both)

    one = {"input_ids": torch.ones(2, 3, dtype=torch.long), "pixel_values": torch.randn(2, 3, 4, 4)}
    model = Two()
    found = modality_groups(model, find_layers(model)[0], one)
    assert found == {"vision": ("a.weight",), "text": ("b.weight",), "fusion": ("c.weight",)}


def test_tracing_leaves_the_model_and_the_random_state_as_they_were():
    model, one = make("clip")
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    find_reads(model, one)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("allocation", ["global", "lamp", "magnitude", "uniform", "erk"])
def test_every_modality_loses_exactly_its_share(name, allocation):
    model, one = make(name)
    ignore = ["vision_proj", "text_proj"] if name == "blip" else []
    masks = masks_of(model, sparsity=0.7, allocation=allocation, groups="modality", data=[one], ignore=ignore)
    for names in modality_groups(model, list(masks), one).values():
        total = sum(masks[n].numel() for n in names)
        assert allocation == "uniform" or sum(int((~masks[n]).sum()) for n in names) == removed_count(total, 0.7)
        if allocation == "uniform":
            assert all(int((~masks[n]).sum()) == removed_count(masks[n].numel(), 0.7) for n in names)


def test_global_within_a_modality_is_global_of_that_modality_alone():
    model, one = make("clip")
    groups = {"vision": ["vision_model", "visual_projection"], "text": ["text_model", "text_projection"]}
    together = masks_of(model, sparsity=0.6, groups=groups, data=[one])
    for names in find_groups(model, list(together), groups, None).values():
        alone = masks_of(model, sparsity=0.6, layers=list(names))
        assert all(torch.equal(together[n], alone[n]) for n in names)
    assert together.diff(masks_of(model, sparsity=0.6))


def test_groups_survive_several_steps_and_a_recipe_file(tmp_path):
    model, _ = make("clip")
    groups = {"vision": ["vision_model"], "text": ["text_model", "text_projection"]}
    recipe = sc.Recipe.make(sparsity=0.8, groups=groups, schedule="exponential", steps=3)
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    assert sc.Recipe.make(tmp_path / "r.toml") == recipe
    masks = sc.prune(model, recipe).masks
    found = find_groups(model, list(masks), groups, None)
    assert found["other"] == ("visual_projection.weight",)
    for names in found.values():
        total = sum(masks[n].numel() for n in names)
        assert sum(int((~masks[n]).sum()) for n in names) == removed_count(total, 0.8)


def test_what_cannot_be_grouped_is_refused_in_words():
    model, one = make("clip")
    with pytest.raises(UnknownName, match=r"vision_modle.*Did you mean 'vision_model'"):
        sc.plan(model, sparsity=0.5, groups={"vision": ["vision_modle"]})
    with pytest.raises(RecipeError, match="two groups"):
        sc.plan(model, sparsity=0.5, groups={"a": ["vision_model"], "b": ["vision_model.encoder"]})
    with pytest.raises(RecipeError, match="pass data="):
        sc.plan(model, sparsity=0.5, groups="modality")
    with pytest.raises(RecipeError, match="nothing to decide"):
        sc.prune(model, pattern="2:4", groups="modality", data=[one])
    with pytest.raises(RecipeError, match="cuts units"):
        sc.prune(model, sparsity=0.5, pattern="ffn", groups="modality", data=[one])
    words = {k: one[k] for k in ("input_ids", "attention_mask")}
    with pytest.raises(RecipeError, match="nothing to keep apart"):
        sc.prune(model.text_model, sparsity=0.5, groups="modality", data=[words])


def test_missing_images_and_batches_of_padding_are_named():
    model, one = make("llava")
    words = {k: v[:, 5:] for k, v in one.items() if k != "pixel_values"}
    with pytest.raises(DataError, match=r"does not reach.*vision_tower.*also takes.*pixel_values"):
        sc.plan(model, sparsity=0.5, groups="modality", data=[words])
    with pytest.raises(DataError, match="batch 1 of the data has no images"):
        sc.plan(model, sparsity=0.5, criterion="wanda", data=[one, words])
    with pytest.raises(DataError, match="batch 0 of the data is all padding"):
        sc.prune(model, sparsity=0.5, data=[{**one, "attention_mask": torch.zeros_like(one["attention_mask"])}])


def test_the_alarm_says_which_modality_collapsed():
    model, one = make("clip")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("text_"):
                parameter.mul_(0.01)
    notes = sc.prune(model, sparsity=0.5, data=[one]).report.notes
    assert any("text has collapsed" in n for n in notes)


def test_a_layer_that_next_to_nothing_is_left_of_is_named():
    layers = [LayerPlan("a", (100,), 100, 90, "element"), LayerPlan("b", (1000,), 1000, 10, "element")]
    assert collapse_notes(layers, None) == []  # 1% beside 9.1%: not a tenth
    layers.append(LayerPlan("c", (1000,), 1000, 950, "element"))
    assert "b (1.00%)" in collapse_notes(layers, None)[0]
    assert "g has collapsed: 10 of its 1,000" in collapse_notes(layers, {"g": ("b",), "h": ("a", "c")})[0]


def test_batches_of_each_family_name_the_padding():
    assert all(int(batch(name)["attention_mask"].sum(1).min()) < batch(name)["attention_mask"].shape[1] for name in NAMES)
