"""Every command as a user types it: in a process of its own, from a fresh folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMANDS = ["demo", "plan", "prune", "scan", "measure", "deploy", "inspect", "methods", "doctor", "report"]
NET = "secateur.demo:network?width=8"
TEST = "secateur.demo:digits?part=test"
TRAIN = "secateur.demo:digits?part=train"


def secateur(*words: str, cwd: Path, status: int = 0) -> str:
    """Standard output of a command that must end with `status`; no traceback is ever shown."""
    done = subprocess.run(
        [sys.executable, "-m", "secateur", *words], cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == status, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A folder in which the small network was pruned three ways at once."""
    folder = tmp_path_factory.mktemp("cli")
    secateur("prune", NET, "-s", "0.5,0.9", "-c", "magnitude,taylor", "--data", TRAIN, "--test", TEST, "--reestimate-norms",
             "--limit", "128", "--out", "runs", cwd=folder)  # fmt: skip
    return folder


def test_help_is_quick_and_complete(tmp_path):
    times = []
    for _ in range(5):
        start = time.monotonic()
        text = secateur("--help", cwd=tmp_path)
        times.append(time.monotonic() - start)
    assert all(command in text for command in COMMANDS)
    assert min(times) < 1.0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(command, tmp_path):
    text = secateur(command, "--help", cwd=tmp_path)
    assert "--json" in text
    assert command in ("demo", "doctor") or f"Example: secateur {command}" in " ".join(text.split())


def test_a_comparison_writes_each_run_and_a_page(run_dir):
    runs = {p.name for p in (run_dir / "runs").iterdir()}
    assert runs == {"magnitude-50", "magnitude-90", "taylor-50", "taylor-90", "report.html"}
    page = (run_dir / "runs" / "report.html").read_text()
    assert "magnitude 90% element" in page
    assert "taylor 50% element" in page


def test_what_was_written_can_be_inspected_measured_reported_and_pruned_again(run_dir):
    found = json.loads(secateur("inspect", "runs/magnitude-90", "--json", cwd=run_dir))
    assert found["kind"] == "artifact"
    weights = [t for t in found["tensors"] if len(t["shape"]) >= 2]
    share = sum(t["zeros"] for t in weights) / sum(t["elements"] for t in weights)
    assert share == pytest.approx(0.9, abs=1e-3)
    measured = json.loads(secateur("measure", "runs/magnitude-90", "--test", TEST, "--no-latency", "--json", cwd=run_dir))
    report = json.loads((run_dir / "runs" / "magnitude-90" / "report.json").read_text())
    assert measured["nonzeros"] == report["after"]["nonzeros"]
    assert measured["quality"] == report["after"]["quality"]
    assert "after" in json.loads(secateur("report", "runs/magnitude-90", "--json", cwd=run_dir))
    secateur("report", "runs/magnitude-90", "runs/taylor-90", "--out", "both.html", cwd=run_dir)
    assert "taylor" in (run_dir / "both.html").read_text()
    again = json.loads(secateur("prune", "runs/magnitude-50", "-s", "0.75", "--out", "again", "--json", cwd=run_dir))
    assert again["after"]["nonzeros"] < again["before"]["nonzeros"]


def test_a_recipe_file_and_options_over_it(tmp_path):
    (tmp_path / "r.toml").write_text('sparsity = 0.5\nallocation = "erk"\n')
    plan = json.loads(secateur("plan", NET, "--recipe", "r.toml", "--json", cwd=tmp_path))
    kept, total = (sum(layer[k] for layer in plan["layers"]) for k in ("kept", "parameters"))
    assert kept == total - round(total / 2)
    assert len({layer["kept"] / layer["parameters"] for layer in plan["layers"]}) > 1
    harder = json.loads(secateur("plan", NET, "--recipe", "r.toml", "-s", "0.75", "--json", cwd=tmp_path))
    assert sum(layer["kept"] for layer in harder["layers"]) == total - int(0.75 * total + 0.5)


def test_scan_is_resumed_from_its_cache(tmp_path):
    words = ("scan", NET, "--test", TEST, "-s", "0.5,0.9", "--layers", "4", "--layers", "0", "--json")
    first = json.loads(secateur(*words, cwd=tmp_path))
    assert {c["layer"] for c in first} == {"4.weight", "0.0.weight"}
    assert (tmp_path / "runs" / "scan").is_dir()
    assert json.loads(secateur(*words, cwd=tmp_path)) == first


def test_scan_curves_are_shown_in_the_report(tmp_path):
    words = ("prune", NET, "-s", "0.5", "--test", TEST, "--scan", "--out", "run", "--json")
    report = json.loads(secateur(*words, cwd=tmp_path))
    assert [c["layer"] for c in report["sensitivity"]] == [layer["name"] for layer in report["layers"]]
    assert "Sensitivity" in (tmp_path / "run" / "report.html").read_text()


def test_methods_lists_every_registered_piece(tmp_path):
    pieces = json.loads(secateur("methods", "--json", cwd=tmp_path))
    assert {p["kind"] for p in pieces} >= {"criterion", "unit criterion", "pattern", "allocation", "schedule", "solver"}
    assert {"magnitude", "taylor", "snip", "grasp", "synflow", "obd", "lamp", "random"} <= {p["name"] for p in pieces}
    assert all(p["source"] and p["summary"] for p in pieces)
    assert "Molchanov" in " ".join(secateur("methods", "taylor", cwd=tmp_path).split())


def test_deploy_shows_each_layer_and_never_a_slower_model(run_dir):
    outputs = ("--out", "fast.safetensors", "--report", "fast.html")
    summary = json.loads(secateur("deploy", "runs/magnitude-90", "--data", TEST, *outputs, "--json", cwd=run_dir))
    assert summary["error"] < 1e-4
    assert {layer["name"] for layer in summary["layers"]} >= {"1.0.conv1", "4"}
    assert all(layer["reason"] for layer in summary["layers"] if layer["runtime"] == "dense")
    assert (run_dir / "fast.safetensors").exists()
    assert "Time of each layer" in (run_dir / "fast.html").read_text(encoding="utf-8")
    found = json.loads(secateur("measure", "runs/magnitude-90", "--data", TEST, "--layers", "--json", cwd=run_dir))
    assert [layer["name"] for layer in found["deployed"]["layers"]] == [layer["name"] for layer in summary["layers"]]


def test_doctor(tmp_path):
    checks = {c["what"]: c for c in json.loads(secateur("doctor", "--json", cwd=tmp_path))}
    assert checks["torch computes"]["state"] == "ok"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("prune", "nosuchkind:x", "-s", "0.5"), "nosuchkind"),
        (("prune", NET, "-s", "1"), "whole number"),
        (("prune", NET, "-s", "1.5"), "[0, 1)"),
        (("prune", NET, "-s", "half"), "'half'"),
        (("prune", NET, "-s", "0.5", "-c", "magntude"), "Did you mean 'magnitude'"),
        (("prune", NET, "-s", "0.5", "-c", "taylor"), "data"),
        (("prune", NET, "-s", "0.5,0.5", "--out", "x"), "same"),
        (("prune", NET, "-s", "0.5", "--lr", "0.1"), "--finetune"),
        (("prune", NET, "--recipe", "none.toml"), "none.toml"),
        (("inspect", "nowhere"), "nowhere"),
        (("report", "nowhere"), "nowhere"),
        (("methods", "tailor"), "Did you mean 'taylor'"),
        (("scan", NET), "--test"),
        (("measure", "secateur.demo:netwrk"), "Did you mean 'network'"),
    ],
)
def test_bad_input_ends_with_one_clear_line(words, expected, tmp_path):
    text = secateur(*words, cwd=tmp_path, status=1)
    assert expected in " ".join(text.split())
    assert text.strip().count("\n") < 4


def test_an_output_directory_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for extra in ((), ("--overwrite",)):
        text = secateur("prune", NET, "-s", "0.5", "--out", "mine", *extra, cwd=tmp_path, status=1)
        assert "mine" in text
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_options_of_a_method_follow_a_question_mark():
    from secateur.cli.recipes import piece, recipe_of
    from secateur.errors import RecipeError

    recipe = recipe_of(None, sparsity=0.5, pattern="channel?round_to=8&combine=first")
    assert recipe.pattern == {"name": "channel", "round_to": 8, "combine": "first"}
    assert piece("2:4") == "2:4"
    with pytest.raises(RecipeError, match="key=value"):
        piece("channel?round_to")


def test_a_solver_is_an_option(tmp_path):
    words = ("prune", NET, "-s", "0.5", "--solver", "sparsegpt?damp=0.05", "--data", TRAIN, "--limit", "64", "--json")
    found = json.loads(secateur(*words, cwd=tmp_path))
    assert 'name = "sparsegpt"' in found["recipe"]
    assert "damp = 0.05" in found["recipe"]
    assert all(layer["error"] is not None for layer in found["layers"])


def test_slimming_and_forced_units_are_options():
    from secateur.cli.recipes import recipe_of

    recipe = recipe_of(None, sparsity=0.5, pattern="channel", slimming=3, slimming_strength=1e-3, force=["conv1[3,5]"])
    assert (recipe.slimming.epochs, recipe.slimming.strength, recipe.force) == (3, 1e-3, ("conv1[3,5]",))


@pytest.mark.parametrize(
    ("allocation", "expected"), [("sensitivity", True), ({"name": "sensitivity"}, True), ("uniform", False), (None, False)]
)
def test_a_recipe_that_goes_by_curves_is_scanned_first_however_it_names_them(allocation, expected):
    from secateur.cli.prune import needs_scan
    from secateur.recipe import Recipe

    assert needs_scan(Recipe.make(allocation=allocation)) is expected
