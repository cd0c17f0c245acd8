"""Importing the package costs nothing: no torch, no file opened, no CUDA; and every public name is there and explained."""

from __future__ import annotations

import inspect
import subprocess
import sys

import secateur


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_no_torch_and_opens_no_file():
    code = """
import sys, importlib
import secateur.__init__
opened = []
def watch(event, args):
    if event == "open" and not str(args[0]).endswith((".py", ".pyc")):
        opened.append(args[0])
del sys.modules["secateur"], sys.modules["secateur.__init__"]
sys.addaudithook(watch)
import secateur
print("torch" in sys.modules, opened)
"""
    assert run(code) == "False []"


def test_every_public_name_loads_and_is_documented():
    assert 5 <= len(secateur.__all__) <= 25
    for name in secateur.__all__:
        value = getattr(secateur, name)
        if callable(value):
            assert inspect.getdoc(value), name
            assert len(inspect.getdoc(value)) > 60, name


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(secateur, "prunes")


def test_parts_that_stand_on_each_other_can_be_imported_in_any_order():
    for first in ("secateur.budgets.choose", "secateur.measure.scan_units", "secateur.structured"):
        assert run(f"import {first}; print('done')") == "done"
