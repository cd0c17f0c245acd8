"""Gates on a model of which neurons were cut or masked: saved, loaded into the whole architecture, and still cut."""

from __future__ import annotations

import pytest
import torch
from dynamic_cases import residual, vectors

import secateur as sc
from secateur.errors import ArtifactError

OPTIONS = {"teal": {"positions": 8, "step": 0.25}, "dejavu": {"rank": 2, "steps": 5}}


@pytest.mark.parametrize("method", OPTIONS)
def test_gates_of_a_cut_model_come_back_with_its_cuts(method, tmp_path):
    result = sc.prune(residual(), pattern="channel", sparsity=0.5, data=vectors())
    gated = sc.dynamic(result.model, method=method, data=vectors(), budget=0.7, **OPTIONS[method])
    sc.save(gated, tmp_path / "a", plan=result.plan)
    again = sc.load(tmp_path / "a", model=residual())
    assert again.model[1][0].up.linear.out_features < 64
    assert again.budget == 0.7
    with torch.no_grad():
        assert torch.equal(again(vectors()[0]), gated(vectors()[0]))
    whole = sc.load(tmp_path / "a", model=result.model)
    with torch.no_grad():
        assert torch.equal(whole(vectors()[0]), gated(vectors()[0]))


def test_masked_neurons_are_not_chosen():
    """The predictors learn that a neuron without weights adds nothing: at half of the budget none of them is computed."""
    result = sc.prune(
        residual(), pattern="neuron", sparsity=0.4, allocation="uniform", data=vectors(), ignore=["0", "2", "*down*"]
    )
    model = result.model
    gated = sc.dynamic(model, method="dejavu", data=vectors(), budget=0.5, rank=2, steps=300, lr=0.01, active=0.3)
    with torch.no_grad():
        gated(vectors()[0])
    for block in gated.model[1]:
        dead = (block.up.linear.weight == 0).all(1).nonzero().flatten()
        assert len(dead) > 10
        assert not torch.isin(block.up.choice.chosen, dead).any()


def test_an_artifact_whose_gates_are_nonsense_is_refused(tmp_path):
    gated = sc.dynamic(residual(), method="teal", data=vectors(), **OPTIONS["teal"])
    gated.options = {"step": 7}
    sc.save(gated, tmp_path / "a")
    with pytest.raises(ArtifactError, match="gates of the artifact"):
        sc.load(tmp_path / "a", model=residual())
