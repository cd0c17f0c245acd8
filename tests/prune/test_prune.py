"""The main job end to end, and the bad input that it must refuse before it loses anything."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.demo import digits, network
from secateur.errors import ArtifactError, DataError, LayerError, NonFiniteError, RecipeError, SecateurError, UnknownName
from secateur.types import Plan


class Mlp(nn.Sequential):
    def __init__(self, *widths: int):
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        super().__init__(*layers[:-1])


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    """The state as bytes: for comparisons in which NaN equals NaN and -0.0 differs from 0.0."""
    return {
        k: v.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for k, v in model.state_dict().items()
        if v.numel()
    }


def test_the_worked_example_of_every_text():
    model = nn.Linear(3, 2)
    model.weight.data = torch.tensor([[0.3, -0.8, 0.1], [-0.05, 0.9, -0.2]])
    result = sc.prune(model, sparsity=0.5)
    assert result.masks["weight"].tolist() == [[True, True, False], [False, True, False]]
    torch.testing.assert_close(result.model.weight.data, torch.tensor([[0.3, -0.8, 0.0], [0.0, 0.9, 0.0]]), rtol=0, atol=0)


@pytest.mark.parametrize("pattern", ["element", "row", "neuron", "2:4", "4x1"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_dense_networks_of_any_depth(pattern, depth):
    torch.manual_seed(0)
    model = Mlp(*[8] * (depth + 1))
    before = state_bytes(model)
    result = sc.prune(model, pattern=pattern, sparsity=0.5)
    assert state_bytes(model) == before, "the model that was given is left untouched"
    assert result.masks.sparsity() == 0.5
    assert result.plan.sparsity == 0.5
    for name, mask in result.masks.items():
        weight = result.model.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        assert torch.equal(weight[mask], model.get_parameter(name)[mask])
    assert result.report.after.nonzeros < result.report.before.nonzeros
    if pattern == "neuron":
        weights = [m for m in result.masks.values() if m.dim() == 2]
        assert len(weights) == depth
        assert all((m.all(1) | ~m.any(1)).all() for m in weights)


def test_whole_neurons_leave_nothing_of_a_neuron_behind():
    """A row without weights and with its bias still gives a constant: the neuron is not gone. It must be."""
    torch.manual_seed(0)
    result = sc.prune(Mlp(6, 8, 4), sparsity=0.5, pattern="neuron", layers=["0"])
    gone = ~result.masks["0.weight"].any(1)
    assert int(gone.sum()) == 4
    assert (result.model[0].bias[gone] == 0).all()
    assert (result.model[0].bias[~gone] != 0).all()


def test_ties_are_cut_by_exact_count():
    model = nn.Linear(10, 10, bias=False)
    nn.init.ones_(model.weight)
    for sparsity in (0.0, 0.01, 0.25, 0.5, 0.99):
        assert sc.prune(model, sparsity=sparsity).masks.kept() == 100 - round(100 * sparsity)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "snip", "grasp", "synflow", "obd", "lamp", "wanda", "random"])
def test_every_criterion_prunes_a_convolutional_network(criterion):
    model, batches = network(8), digits("train")[:3]
    with torch.no_grad():
        model[0][0].weight.mul_(1.0)
    before = state_bytes(model)
    result = sc.prune(model, sparsity=0.7, criterion=criterion, data=batches)
    total = result.masks.total()
    assert result.masks.kept() == total - int(0.7 * total + 0.5)
    assert state_bytes(model) == before


def test_iterative_snip_removes_step_by_step_and_never_brings_back():
    model, batches = network(8), digits("train")[:2]
    once = sc.prune(model, sparsity=0.9, criterion="snip", data=batches)
    steps = sc.prune(model, sparsity=0.9, criterion="snip", data=batches, schedule="exponential", steps=5)
    assert once.masks.kept() == steps.masks.kept()
    assert once.masks.diff(steps.masks), "statistics are taken anew after each step"


def test_fine_tuning_recovers_what_pruning_lost_and_keeps_the_zeros():
    from secateur.data.evaluate import accuracy
    from secateur.demo import trained

    dense = trained(epochs=4)
    evaluate = accuracy(digits("test"))
    raw = sc.prune(dense, sparsity=0.95, evaluate=evaluate)
    tuned = sc.prune(dense, sparsity=0.95, evaluate=evaluate, data=digits("train"), finetune={"epochs": 2, "lr": 2e-3})
    lost = raw.report.before.quality["accuracy"] - raw.report.after.quality["accuracy"]
    assert lost > 0.1
    assert tuned.report.after.quality["accuracy"] > raw.report.after.quality["accuracy"] + 0.8 * lost
    assert tuned.masks.diff(raw.masks) == {}
    for name, mask in tuned.masks.items():
        assert (tuned.model.get_parameter(name)[~mask] == 0).all()


def test_an_artifact_is_written_and_loads_to_the_same_bits(tmp_path):
    model = network(8)
    result = sc.prune(
        model, sparsity=0.8, out=tmp_path / "run", source="secateur.demo:network?width=8", example=torch.zeros(1, 1, 8, 8)
    )
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "model.safetensors", "secateur.json", "recipe.toml", "report.json", "report.html", "README.md",
    }  # fmt: skip
    assert state_bytes(sc.load(tmp_path / "run")) == state_bytes(result.model)
    assert state_bytes(sc.load(tmp_path / "run", model=network(8))) == state_bytes(result.model)
    report = sc.Report.from_json(json.loads((tmp_path / "run" / "report.json").read_text()))
    assert report == result.report
    assert sc.Recipe.make(tmp_path / "run" / "recipe.toml").sparsity == 0.8
    assert report.after.bytes_disk < 0.5 * report.before.bytes_disk


def test_same_seed_same_bits():
    first, second = (
        sc.prune(
            network(8).apply(_fill), sparsity=0.5, criterion="random", seed=3, data=digits("train")[:2], finetune={"epochs": 1}
        )
        for _ in range(2)
    )
    assert state_bytes(first.model) == state_bytes(second.model)


def _fill(module: nn.Module) -> None:
    for i, parameter in enumerate(module.parameters(recurse=False)):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) / 10


def test_plan_says_what_prune_does_and_touches_nothing():
    model = network(8)
    before = state_bytes(model)
    plan = sc.plan(model, sparsity=0.9, allocation="erk", ignore=["4"])
    assert state_bytes(model) == before
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    result = sc.prune(model, sparsity=0.9, allocation="erk", ignore=["4"])
    assert result.plan == plan
    assert plan.skipped == {"4.weight": "ignored as asked"}


def test_layers_that_a_pattern_does_not_fit_are_named_not_silently_skipped():
    result = sc.prune(network(8), pattern="2:4")
    assert "1 input features" in result.plan.skipped["0.0.weight"]
    assert result.report.skipped == result.plan.skipped
    with pytest.raises(LayerError, match=r"0\.0\.weight.*1 input features"):
        sc.prune(network(8), pattern="2:4", layers=["0.0"])
    with pytest.raises(LayerError, match=r"nothing to prune.*10 input features"):
        sc.prune(nn.Linear(10, 4), pattern="2:4")


def test_channels_are_cut_for_real_and_the_artifact_rebuilds_the_smaller_network(tmp_path):
    model, batches = network(8), digits("train")[:4]
    before = state_bytes(model)
    result = sc.prune(
        model, pattern="channel", sparsity=0.5, data=batches, reestimate_norms=True, finetune={"epochs": 1},
        out=tmp_path / "run", source="secateur.demo:network?width=8",
    )  # fmt: skip
    assert state_bytes(model) == before
    assert result.model[0][0].out_channels == 4
    assert result.model[1][1].conv1.weight.shape == (8, 4, 3, 3)
    assert result.model[4].weight.shape == (10, 8), "the outputs of the model are never cut"
    assert result.report.after.parameters < 0.3 * result.report.before.parameters
    assert result.report.after.macs < 0.3 * result.report.before.macs
    assert result.masks["1.1.conv1.weight"].shape == model[1][1].conv1.weight.shape
    assert int(result.masks["1.1.conv1.weight"].sum()) == result.model[1][1].conv1.weight.numel()
    loaded = sc.load(tmp_path / "run")
    assert state_bytes(loaded) == state_bytes(result.model)
    x = batches[0][0]
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(x), result.model.eval()(x))
    assert state_bytes(sc.load(tmp_path / "run", model=network(8))) == state_bytes(result.model)
    again = sc.prune(loaded, pattern="channel", sparsity=0.5, example=x)
    assert again.model[0][0].out_channels == 2


def test_dense_networks_lose_whole_neurons_for_real():
    model = Mlp(6, 12, 8, 4)
    x = torch.randn(5, 6)
    result = sc.prune(model, pattern="channel", sparsity=0.5, example=x, criterion="magnitude", reduction="l2")
    assert [m.weight.shape for m in result.model if isinstance(m, nn.Linear)] == [(6, 6), (4, 6), (4, 4)]
    masked = copy.deepcopy(model)
    result.masks.apply(masked)
    torch.testing.assert_close(result.model(x), masked(x), rtol=1e-5, atol=1e-6)
    plan = sc.plan(model, pattern="channel", sparsity=0.5, example=x, reduction="l2")
    assert plan == result.plan


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "pass example="),
        ({"solver": "keep", "allocation": "erk"}, "uniform, isomorphic, global"),
        ({"steps": 3, "schedule": "cubic"}, "one step"),
        ({"sparsity": None}, "missing"),
        ({"criterion": "taylor"}, "pass data="),
        ({"pattern": {"name": "channel", "round_to": 0}}, "round_to"),
        ({"pattern": "head", "data": [torch.zeros(2, 4)]}, "nothing to cut"),
    ],
)
def test_bad_recipes_for_units(changes, words):
    with pytest.raises(SecateurError, match=words):
        sc.prune(Mlp(4, 4, 2), **{"sparsity": 0.5, "pattern": "channel", **changes})


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [1.0, -0.5, 1.5, 1, 0, True, "0.5", float("nan"), float("inf")])
def test_impossible_sparsities(sparsity):
    with pytest.raises(RecipeError, match="sparsity"):
        sc.prune(nn.Linear(4, 4), sparsity=sparsity)


def test_missing_and_contradicting_sparsity():
    with pytest.raises(RecipeError, match="missing"):
        sc.prune(nn.Linear(4, 4))
    with pytest.raises(RecipeError, match=r"2:4 removes exactly 0\.5"):
        sc.prune(nn.Linear(4, 4), sparsity=0.9, pattern="2:4")
    with pytest.raises(RecipeError, match="allocation 'global' has nothing to decide"):
        sc.prune(nn.Linear(4, 4), allocation="global", pattern="2:4")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_name_the_tensor_and_the_count(value):
    model = Mlp(4, 4, 4)
    model[2].weight.data[0, :2] = value
    with pytest.raises(NonFiniteError, match=r"2\.weight.*(2 NaN|2 infinite)"):
        sc.prune(model, sparsity=0.5)


def test_non_finite_activations_are_named():
    model = Mlp(4, 4, 2)
    nn.init.constant_(model[0].weight, 2.0)
    batch = torch.full((3, 4), 3e38)
    with pytest.raises(SecateurError, match=r"NaN or infinite|NaN and"):
        sc.prune(model, sparsity=0.5, criterion="taylor", data=[(batch, torch.zeros(3, dtype=torch.long))])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "gave no batches"),
        ([(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))], "empty"),
        ([(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))], "3 inputs and 2 labels"),
        ([torch.zeros(3, 4)], "labels"),
        (torch.zeros(3, 4), "iterable of batches"),
        ([(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))], "3x5"),
        (None, "pass data="),
    ],
)
def test_bad_calibration_data(data, words):
    model = Mlp(4, 4, 2)
    before = state_bytes(model)
    with pytest.raises((DataError, RecipeError, SecateurError), match=words):
        sc.prune(model, sparsity=0.5, criterion="taylor", data=data)
    assert state_bytes(model) == before


def test_one_sample_and_a_generator_are_enough():
    model = Mlp(4, 4, 2)
    one = (torch.ones(1, 4), torch.zeros(1, dtype=torch.long))
    listed = sc.prune(model, sparsity=0.5, criterion="taylor", data=[one], schedule="iterative", steps=2)
    generated = sc.prune(model, sparsity=0.5, criterion="taylor", data=(b for b in [one]), schedule="iterative", steps=2)
    assert listed.masks.diff(generated.masks) == {}


def test_awkward_layers():
    class Awkward(nn.Module):
        def __init__(self):
            super().__init__()
            self.empty = nn.Linear(0, 3)
            self.one = nn.Linear(1, 1)
            self.equal = nn.Linear(4, 4)
            self.zero = nn.Linear(4, 4)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.equal.weight
            self.f16 = nn.Linear(4, 4, dtype=torch.float16)
            self.bf16 = nn.Linear(4, 4, dtype=torch.bfloat16)
            self.complex = nn.Linear(4, 4, dtype=torch.complex64)
            self.strided = nn.Linear(4, 8)
            self.strided.weight = nn.Parameter(torch.randn(4, 8).t())
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            nn.init.constant_(self.equal.weight, 0.5)
            nn.init.zeros_(self.zero.weight)

    model = Awkward()
    result = sc.prune(model, sparsity=0.5, allocation="uniform")
    assert set(result.plan.skipped) == {"empty.weight", "complex.weight"}
    assert "complex" in result.plan.skipped["complex.weight"]
    for name in ("equal", "zero", "f16", "bf16", "strided", "frozen"):
        mask = result.masks[f"{name}.weight"]
        assert mask.sum() == mask.numel() // 2
        assert (result.model.get_parameter(f"{name}.weight")[~mask] == 0).all()
    assert result.model.tied.weight is result.model.equal.weight
    assert not result.model.frozen.weight.requires_grad
    assert result.model.f16.weight.dtype == torch.float16
    assert not result.model.strided.weight.is_contiguous()


def test_meta_weights_are_refused():
    with pytest.raises(LayerError, match="meta device"):
        sc.prune(nn.Linear(4, 4, device="meta"), sparsity=0.5)


def test_an_embedding_is_not_pruned_through_its_tie():
    model = nn.Module()
    model.embed, model.head, model.fc = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), nn.Linear(4, 4)
    model.head.weight = model.embed.weight
    result = sc.prune(model, sparsity=0.5)
    assert list(result.masks) == ["fc.weight"]
    assert "tied to the embedding" in result.plan.skipped["head.weight"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"criterion": "magnitud"}, "Did you mean 'magnitude'"),
        ({"pattern": "elements"}, "Did you mean 'element'"),
        ({"allocation": "globl"}, "Did you mean 'global'"),
        ({"schedule": "cubik", "steps": 2}, "Did you mean 'cubic'"),
        ({"solver": "kep"}, "Did you mean 'keep'"),
        ({"reduction": "summ"}, "Did you mean 'sum'"),
        ({"layers": ["0.wieght"]}, "Did you mean '0.weight'"),
        ({"ignore": ["9.*"]}, "unknown layer '9"),
        ({"schedule": {"name": "exponential", "inital": 0.3}, "steps": 2}, "Did you mean 'initial'"),
        ({"steps": 3}, "one-shot"),
        ({"sparsty": 0.5}, "Did you mean 'sparsity'"),
        ({"reestimate_norms": True}, "pass data="),
        ({"finetune": {"epochs": 1}}, "batches to train on"),
    ],
)
def test_misspelt_and_impossible_recipes_are_refused_before_any_work(changes, words):
    model = Mlp(4, 4, 2)
    before = state_bytes(model)
    with pytest.raises((RecipeError, UnknownName), match=words):
        sc.prune(model, **{"sparsity": 0.5, **changes}, inplace=True)
    assert state_bytes(model) == before


def test_an_output_directory_in_use_is_refused_before_any_work(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    calls = []
    with pytest.raises(ArtifactError, match="not empty"):
        sc.prune(Mlp(4, 4), sparsity=0.5, out=tmp_path / "run", evaluate=lambda m: calls.append(1) or 1.0)
    assert (tmp_path / "run" / "precious.txt").read_text() == "mine"
    assert not calls


def test_a_collapsed_layer_is_reported():
    model = Mlp(4, 4, 4)
    model[0].weight.data.mul_(1e-6)
    result = sc.prune(model, sparsity=0.5)
    assert any("0.weight" in note and "lost every weight" in note for note in result.report.notes)


def test_inplace_prunes_the_model_itself():
    model = Mlp(4, 4)
    result = sc.prune(model, sparsity=0.5, inplace=True)
    assert result.model is model
    assert (model[0].weight == 0).sum() == 8


def test_the_result_can_be_pruned_again_and_copied():
    model = Mlp(8, 8, 8)
    once = sc.prune(model, sparsity=0.5).model
    twice = sc.prune(copy.deepcopy(once), sparsity=0.75)
    assert twice.masks.sparsity() == 0.75
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twice.model.modules())
