"""Visual attention against what the models themselves say of it; heads by YOPO; late layers without visual tokens."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
import torch
from torch import nn
from vision_language_models import make

import secateur as sc
from secateur.criteria import UNIT_CRITERIA
from secateur.errors import DataError, LayerError, ModelError, RecipeError, UnknownName
from secateur.types import UnitStats
from secateur.vision_language.attention import AttentionProfile, attention_profile
from secateur.vision_language.phantom import PhantomAttention, narrow, widen
from secateur.vision_language.skip import skip_visual_tokens

LAYERS = "model.language_model.layers"


@torch.no_grad()
def shares(attentions, visual: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
    """``[samples, heads]`` of each layer, by loops over samples and heads."""
    found = []
    for weights in attentions:
        rows = [
            [float(head[t][:, v].sum() / head[t].sum()) for head in sample]
            for sample, v, t in zip(weights, visual, text, strict=True)
        ]
        found.append(torch.tensor(rows))
    return found


def test_the_profile_of_llava_is_what_its_attention_maps_say():
    model, one = make("llava")
    model(**one)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    profile = attention_profile(model, [one, one])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert list(profile.shares) == [f"{LAYERS}.0.self_attn", f"{LAYERS}.1.self_attn"]
    model.set_attn_implementation("eager")
    visual = one["input_ids"] == 45
    expected = shares(model(**one, output_attentions=True).attentions, visual, ~visual & one["attention_mask"].bool())
    for found, wanted in zip(profile.shares.values(), expected, strict=True):
        torch.testing.assert_close(found, torch.cat([wanted, wanted]))


class Joined(nn.Module):
    """Image positions and tokens in one row of `nn.MultiheadAttention`, with a start of the model's own."""

    def __init__(self):
        super().__init__()
        self.patches, self.words = nn.Conv2d(3, 8, 2, 2), nn.Embedding(9, 8)
        self.start = nn.Parameter(torch.randn(1, 1, 8))
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, input_ids, attention_mask, pixel_values):
        seen = self.patches(pixel_values).flatten(2).transpose(1, 2)
        row = torch.cat([self.start.expand(len(seen), -1, -1), seen, self.words(input_ids)], 1)
        padding = nn.functional.pad(attention_mask == 0, (5, 0), value=False)
        return self.attend(row, row, row, key_padding_mask=padding, average_attn_weights=False)


def test_image_positions_that_are_joined_to_tokens_are_found():
    model = Joined().eval()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    one = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]), "attention_mask": mask, "pixel_values": torch.randn(2, 3, 4, 4)}
    found = attention_profile(model, [one]).shares["attend"]
    visual = torch.zeros(2, 8, dtype=torch.bool)
    visual[:, 1:5] = True
    text = nn.functional.pad(mask.bool(), (5, 0), value=False)
    torch.testing.assert_close(found, shares([model(**one)[1]], visual, text)[0])


def test_the_ratio_is_visual_over_other_and_late_quiet_layers_are_found():
    profile = AttentionProfile({n: torch.full((2, 3), s) for n, s in zip("abcd", (0.6, 0.01, 0.2, 0.015), strict=True)})
    torch.testing.assert_close(profile.ratio("a"), torch.full((2, 3), 1.5))
    assert profile.quiet_from(below=0.02) == "d"
    assert profile.quiet_from(below=0.3) == "b"
    assert profile.quiet_from(below=0.001) is None


def test_the_drawing_is_well_formed_and_says_its_figures(tmp_path):
    profile = AttentionProfile({"a": torch.tensor([[0.5, 0.7]]), "b": torch.tensor([[0.0, 0.1]])})
    profile.save(tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    ET.fromstring(text)
    assert "layer 0: 60.00%, heads 50.00% to 70.00%" in text
    assert "layer 1: 5.00%, heads 0.00% to 10.00%" in text


def test_yopo_by_hand():
    ratio = torch.tensor([[0.2, 0.05, 1.0, 0.0], [0.09, 3.0, 0.0, 0.01], [0.3, 0.0, 0.02, 1.0]])  # of 3 heads in 4 samples
    found = UNIT_CRITERIA["yopo"].make(UnitStats("q", torch.zeros(3, 1), visual_ratio=ratio))
    above = torch.tensor([2 / 4, 1 / 4, 2 / 4])
    ties = torch.stack([sum(r / (1 + r) for r in row) / 4 for row in ratio])
    torch.testing.assert_close(found, above + ties / 5)


@pytest.mark.parametrize("sharp", [0, 1])
def test_yopo_removes_the_head_that_looks_away(sharp):
    model, one = make("llava")
    attention = model.model.language_model.layers[0].self_attn
    rows = slice(8 * sharp, 8 * sharp + 8)
    with torch.no_grad():  # a head whose queries are zero pays alike to all before it; the other to few positions
        attention.q_proj.weight[8 - 8 * sharp : 16 - 8 * sharp] = 0
        attention.k_proj.weight[rows] *= 50
        attention.q_proj.weight[rows] *= 50
    ratio = attention_profile(model, [one]).ratio(f"{LAYERS}.0.self_attn").t()
    threshold = float(ratio[1 - sharp].min()) * 0.99
    score = UNIT_CRITERIA["yopo"].make(UnitStats("q", torch.zeros(2, 1), visual_ratio=ratio), threshold=threshold)
    criterion = {"name": "yopo", "threshold": threshold}
    plan = sc.plan(
        model, pattern="head", criterion=criterion, sparsity=0.5, data=[one], layers=[f"{LAYERS}.0.self_attn.q_proj"]
    )
    kept = next(c.kept for c in plan.cuts if c.tensor == f"{LAYERS}.0.self_attn.q_proj.weight")
    winner = int(score.argmax())
    assert kept == tuple(range(8 * winner, 8 * winner + 8))
    assert float(score.max()) > float(score.min())


def test_yopo_is_of_heads_and_of_models_that_see():
    model, one = make("llava")
    with pytest.raises(LayerError, match="visual attention is of heads"):
        sc.plan(model, pattern="ffn", criterion="yopo", sparsity=0.5, data=[one])
    with pytest.raises(RecipeError, match="threshold > 0"):
        sc.plan(
            model, pattern="head", criterion={"name": "yopo", "threshold": 0.0}, sparsity=0.5, data=[one], ignore=["*vision*"]
        )
    words = {k: v[:, 5:] for k, v in one.items() if k != "pixel_values"}
    with pytest.raises(DataError, match="no visual position"):
        attention_profile(model, [words])
    with pytest.raises(DataError, match="Pass visual="):
        attention_profile(make("clip")[0], [make("clip")[1]])
    with pytest.raises(ModelError, match="no attention"):
        attention_profile(nn.Linear(3, 3), [torch.zeros(2, 3)], visual=lambda batch: torch.ones(2, 3, dtype=torch.bool))


def without_visual_attention(model: nn.Module, one: dict[str, torch.Tensor], first: int) -> torch.Tensor:
    """Logits when, from layer `first` on, text pays no attention to visual positions: by masks, at full cost."""
    visual = one["input_ids"] == 45

    def hook(module, args, kwargs):
        mask = kwargs["attention_mask"]
        length = visual.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & one["attention_mask"].bool()[:, None, None]
        allowed = (
            allowed.expand(len(visual), -1, -1, -1) if mask is None or mask.dtype != torch.bool else mask.expand(3, -1, -1, -1)
        )
        allowed = allowed & ~(visual[:, None, None, :] & ~visual[:, None, :, None])
        return args, {**kwargs, "attention_mask": allowed}

    handles = [
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for layer in model.model.language_model.layers[first:]
    ]
    try:
        return model(**one).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_skipping_tokens_is_skipping_attention_to_them(first, implementation):
    model, one = make("llava")
    with torch.no_grad():
        expected = without_visual_attention(model, one, first)
        model.set_attn_implementation(implementation)
        dense = model(**one).logits
        with skip_visual_tokens(model, f"{LAYERS}.{first}.self_attn"):
            found = model(**one).logits
        text = (one["input_ids"] != 45) & one["attention_mask"].bool()
        assert found.shape == dense.shape
        torch.testing.assert_close(found[text], expected[text], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[text], dense[text], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(**one).logits, dense)


def test_skipped_tokens_are_not_computed_and_generation_goes_on_without_them():
    model, one = make("llava")
    one = {k: v[:2] for k, v in one.items()}
    lengths = []
    last = model.model.language_model.layers[1]
    handle = last.mlp.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    with torch.no_grad(), skip_visual_tokens(model, f"{LAYERS}.1"):
        out = model.generate(**one, max_new_tokens=3, do_sample=False, pad_token_id=1)
        handle.remove()
        length = one["input_ids"].shape[1]
        assert lengths == [length - 4, 1, 1]
        again = {**one, "input_ids": out[:, :-1], "attention_mask": torch.ones_like(out[:, :-1])}
        logits = model(**again).logits[:, -1]  # all at once, without a cache
    assert torch.equal(logits.argmax(-1), out[:, -1])


def test_where_tokens_cannot_be_skipped_it_says_so():
    model, one = make("llava")
    with pytest.raises(UnknownName, match=r"layers\.9"):
        skip_visual_tokens(model, f"{LAYERS}.9")
    with pytest.raises(ModelError, match="in no module list"):
        skip_visual_tokens(model, "model.multi_modal_projector")
    ragged = {**one, "input_ids": one["input_ids"].clone()}
    ragged["input_ids"][0, 1] = 7
    with skip_visual_tokens(model, f"{LAYERS}.1"), pytest.raises(DataError, match="3 to 4 visual positions"):
        model(**ragged)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_phantom_attention_begins_as_the_original(batch_first, separate):
    options = {"kdim": 6, "vdim": 5} if separate else {}
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).eval()
    q = torch.randn(3, 4, 8)
    k, v = (torch.randn(3, 5, 6), torch.randn(3, 5, 5)) if separate else (torch.randn(3, 5, 8),) * 2
    if not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 5])
    mask = torch.randn(6, 4, 5)
    expected = plain(q, k, v, key_padding_mask=padding, attn_mask=mask, average_attn_weights=False)
    found = PhantomAttention(plain, 3)(q, k, v, key_padding_mask=padding, attn_mask=mask, average_attn_weights=False)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_training_fills_the_extra_width_and_narrowing_takes_it_away():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2, enable_nested_tensor=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 5, 8)
    plain = model(x)
    names = widen(model, extra=4)
    assert names == ["layers.0.self_attn", "layers.1.self_attn"]
    torch.testing.assert_close(model(x), plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves what was zero, the second what depends on it
        optimizer.zero_grad()
        model(x).square()[:, :, 0].sum().backward()
        optimizer.step()
    wide = model.get_submodule("layers.0.self_attn")
    assert all(wide.get_submodule(n).weight.abs().sum() > 0 for n in ("query", "key", "value", "back"))
    assert model(x).shape == x.shape
    assert narrow(model) == names
    assert list(model.state_dict()) == list(before)
    with pytest.raises(LayerError, match="nothing to widen"):
        widen(model, extra=2, layers="decoder.*")
    with pytest.raises(RecipeError, match="at least 1"):
        widen(model, extra=0)
