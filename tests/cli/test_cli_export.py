"""`secateur prune --compress`, `secateur export` and `secateur inspect` of what they wrote, one after the other."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from secateur.cli.app import app
from secateur.errors import ExportError

NET = "secateur.demo:network?width=8"


def secateur(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_compress_export_and_inspect(tmp_path):
    small = tmp_path / "small"
    report = json.loads(secateur("prune", NET, "-s", "0.8", "--compress", "4", "--out", str(small), "--json"))
    assert report["after"]["bytes_disk"] == (small / "model.packed").stat().st_size < report["before"]["bytes_disk"] / 10
    seen = json.loads(secateur("inspect", str(small), "--json"))
    assert seen["totals"]["bytes_disk"] == report["after"]["bytes_disk"]
    found = json.loads(secateur("export", str(small), "--to", "csr", "--out", str(tmp_path / "csr"), "--json"))
    assert found["to"] == "csr"
    again = json.loads(secateur("inspect", str(tmp_path / "csr"), "--json"))
    weights = {t["name"]: t["zeros"] for t in seen["tensors"]}
    assert len(again["tensors"]) >= 7
    assert all(t["zeros"] == weights[t["name"]] for t in again["tensors"])
    assert json.loads(secateur("inspect", str(small / "model.packed"), "--json"))["kind"] == "packed"


def test_int8_without_data_and_unknown_formats_are_said(tmp_path):
    for words, message in ((["--to", "onnx", "--int8"], "give --data"), (["--to", "onx"], "Did you mean 'onnx'")):
        with pytest.raises(ExportError, match=message):
            secateur("export", NET, *words, "--out", str(tmp_path / "x"))
