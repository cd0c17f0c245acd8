"""The walls of the house: which part may import which. Read from the syntax tree, so that nothing slips through."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "secateur"
FILES = sorted(SOURCE.rglob("*.py"))
PURE = {"criteria", "patterns", "allocation", "schedules"}
HEAVY = {
    "transformers", "accelerate", "gguf", "timm", "torchvision", "onnx", "onnxruntime", "onnxscript", "openvino", "tensorrt",
    "executorch", "matplotlib", "scipy", "sklearn", "PIL", "lightning", "triton", "jinja2",
}  # fmt: skip
REGISTRIES = {
    "criteria": "CRITERIA",
    "patterns": "PATTERNS",
    "allocation": "ALLOCATIONS",
    "solvers": "SOLVERS",
    "dynamic": "DYNAMIC",
}


def part(path: Path) -> str:
    """The folder or file directly below the package that `path` belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names of everything that a file imports. `if TYPE_CHECKING` blocks are not executed and do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if top_level_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.Import):
                found.update(a.name for a in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path.name} uses a relative import"
                found.update(f"{child.module}.{a.name}" for a in child.names)
            visit(child)

    visit(tree)
    return found


def parts_imported(path: Path) -> set[str]:
    """The parts of the house that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("secateur.") and name.count(".")}


def each(*parts: str) -> list[Path]:
    return [f for f in FILES if part(f) in parts]


def test_there_is_a_house_to_check():
    assert len(FILES) > 40
    assert all(each(p) for p in PURE)


def test_the_reader_sees_what_it_must(tmp_path):
    """A wall test that cannot fail is worth nothing: give the reader a file that breaks walls."""
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from secateur.graph import cut\nimport matplotlib\nif TYPE_CHECKING:\n    import timm\n")
    assert imports(bad) == {"secateur.graph.cut", "matplotlib"}
    assert imports(bad, top_level_only=True) == {"matplotlib"}


@pytest.mark.parametrize("path", each(*PURE), ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_pure_parts_know_nothing_of_each_other(path):
    forbidden = (PURE | {"graph", "runtime", "cli"}) - {part(path)}
    assert not parts_imported(path) & forbidden


@pytest.mark.parametrize("path", each("solvers"), ids=lambda p: p.name)
def test_solvers_do_not_know_criteria(path):
    assert "criteria" not in parts_imported(path)


@pytest.mark.parametrize("path", each("runtime", "export"), ids=lambda p: str(p.relative_to(SOURCE)))
def test_runtime_and_export_know_nothing_of_choosing(path):
    assert not parts_imported(path) & {"criteria", "solvers", "train"}


@pytest.mark.parametrize("path", each("dynamic"), ids=lambda p: p.name)
def test_gates_know_nothing_of_static_choosing(path):
    assert not parts_imported(path) & {"criteria", "patterns", "allocation", "solvers", "export", "cli"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_concrete_pieces_are_found_through_their_registry_only(path):
    for name in imports(path):
        words = name.split(".")
        if name.startswith("secateur.") and len(words) > 2 and words[1] in REGISTRIES and part(path) != words[1]:
            allowed = {
                "secateur",
                words[1],
                "make_pattern",
                "reduce",
                "REDUCTIONS",
                "Units",
                "criterion",
                "Criterion",
                "UNIT_CRITERIA",
                "unit_criterion",
            }
            allowed |= {REGISTRIES[words[1]], "registry", "error_curve", "Dynamic", "dynamic", "rebuild", "module"}
            assert set(words) <= allowed, f"{path.name} names the concrete piece {name}"


@pytest.mark.parametrize("path", each("types", "errors"), ids=lambda p: p.name)
def test_types_and_errors_stand_alone(path):
    assert not [n for n in imports(path) if n.startswith("secateur")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nobody_imports_the_command_line_and_only_the_procedures_import_the_report(path):
    imported = parts_imported(path) - {part(path)}
    assert "cli" not in imported or path.name == "__main__.py"
    assert "report" not in imported or part(path) in ("cli", "prune", "stream")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_heavy_packages_are_imported_inside_functions(path):
    assert not {n.split(".")[0] for n in imports(path, top_level_only=True)} & HEAVY


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_pickle_in_or_out(path):
    roots = {n.split(".")[0] for n in imports(path)}
    assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "torch.save"
            if called == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if called in ("np.load", "numpy.load"):
                assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) == "True" for k in node.keywords)


@pytest.mark.parametrize("path", [f for f in FILES if part(f) != "cli"], ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_the_command_line_prints(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
