from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.recipe import FineTune, Recipe


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"sparsty": 0.5}, ["sparsty", "Did you mean 'sparsity'"]),
        ({"finetune": {"epoch": 1}}, ["finetune.epoch", "Did you mean 'epochs'"]),
        ({"sparsity": 1}, ["int 1", "float in [0, 1)"]),
        ({"sparsity": 1.0}, ["1.0", "remove every weight"]),
        ({"sparsity": -0.5}, ["-0.5", "out of range"]),
        ({"sparsity": 1.5}, ["1.5", "out of range"]),
        ({"sparsity": float("nan")}, ["nan"]),
        ({"sparsity": True}, ["bool"]),
        ({"sparsity": "0.5"}, ["str '0.5'"]),
        ({"steps": "3"}, ["steps", "'3'", "integer"]),
        ({"steps": 0}, ["steps", "greater than or equal to 1"]),
        ({"pattern": 124}, ["pattern", "124"]),
        ({"version": 2}, ["version", "2"]),
        ({"finetune": {"lr": float("inf")}}, ["finetune.lr"]),
        ({"finetune": {"optimizer": "adam"}}, ["finetune.optimizer", "'adamw'"]),
        ({"layers": "fc1"}, ["layers"]),
    ],
)
def test_a_wrong_recipe_is_refused_and_the_error_says_where(bad, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.make(bad)
    for word in words:
        assert word in str(caught.value)


def test_two_faults_are_both_named():
    with pytest.raises(RecipeError, match=r"'steps'.*|steps") as caught:
        Recipe.make({"steps": 0, "cirterion": "taylor"})
    assert "cirterion" in str(caught.value)
    assert "steps" in str(caught.value)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "sparsity": st.floats(0, 0.999),
            "criterion": st.one_of(st.text(), st.fixed_dictionaries({"name": st.text(), "base": st.floats(0, 1)})),
            "steps": st.integers(1, 100),
            "ignore": st.lists(st.text()),
            "layers": st.lists(st.text()),
            "reestimate_norms": st.booleans(),
            "seed": st.integers(0, 2**62),
            "finetune": st.fixed_dictionaries({"epochs": st.integers(1, 9), "lr": st.floats(1e-9, 10)}),
        },
    )
)
def test_toml_and_json_round_trip(tmp_path_factory, data):
    recipe = Recipe.make(data)
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "r.toml").write_text(recipe.to_toml(), encoding="utf-8")
    (folder / "r.json").write_text(json.dumps({"$schema": "x", **recipe.model_dump(mode="json")}), encoding="utf-8")
    assert Recipe.make(folder / "r.toml") == recipe
    assert Recipe.make(folder / "r.json") == recipe


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.toml", b"sparsity ="),
        ("a.json", b"{"),
        ("a.json", b"[1]"),
        ("a.toml", b"\xff\xfe"),
        ("a.yaml", b""),
        ("gone.toml", None),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=name):
        Recipe.make(tmp_path / name)


def test_changes_are_laid_over_a_recipe():
    base = Recipe.make(sparsity=0.5, steps=3)
    assert Recipe.make(base, sparsity=0.7) == Recipe(sparsity=0.7, steps=3)


def test_schema_explains_every_key():
    schema = Recipe.json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert all("description" in p for p in schema["properties"].values())
    assert set(schema["$defs"]["FineTune"]["properties"]) == set(FineTune.model_fields)
    assert schema["additionalProperties"] is False
