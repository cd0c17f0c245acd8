"""Documentation is tested: generated pages are fresh, every command and public name is explained, README blocks run."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import secateur
from secateur.cli.app import app
from secateur.criteria import CRITERIA
from secateur.graph import rules

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(
    str(p.relative_to(ROOT / "src").with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for p in (ROOT / "src" / "secateur").rglob("*.py")
    if p.name != "__main__.py"
)
COMMANDS = [c.name for c in app.registered_commands]


def test_generated_pages_are_fresh():
    done = subprocess.run(
        [sys.executable, "tools/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_command_and_public_name_is_in_the_readme():
    for command in COMMANDS:
        assert f"secateur {command}" in README, command
    for name in secateur.__all__:
        assert re.search(rf"\b{name}\b", README), name


def test_python_blocks_of_the_readme_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CRITERIA, "_entries", dict(CRITERIA._entries))  # the README's own criterion is not for other tests
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)


PAGES = ["compression.md", "runtime.md", "structured.md", "training.md", "vision_language.md"]  # others need yours


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    """In order, in one scope: a page defines what it uses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))  # a page's own rule is not for other tests
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page, "exec"), scope)


def test_every_link_of_the_docs_leads_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module):
    found = importlib.import_module(module)
    result = doctest.testmod(
        found, optionflags=doctest.ELLIPSIS, extraglobs={"nn": __import__("torch").nn, "torch": __import__("torch")}
    )
    assert result.failed == 0
