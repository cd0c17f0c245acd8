"""Write what docs/ takes from the registries and the recipe: docs/methods.md and docs/recipe.schema.json.

python tools/make_docs.py          writes them
python tools/make_docs.py --check  ends with status 1 where they are not what they would be
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

from secateur.allocation import ALLOCATIONS
from secateur.criteria import CRITERIA, UNIT_CRITERIA
from secateur.dynamic import DYNAMIC
from secateur.patterns import PATTERNS
from secateur.recipe import Recipe
from secateur.schedules import SCHEDULES
from secateur.solvers import SOLVERS
from secateur.train.regrow import REGROW

DOCS = Path(__file__).resolve().parents[1] / "docs"
SECTIONS = {
    "Criteria": (CRITERIA, "How much each weight matters: `criterion=`. Higher = keep."),
    "Criteria of whole units": (
        UNIT_CRITERIA,
        "For patterns that cut units out (channel, ffn, head, width, layer): `criterion=`, as well. Higher = keep.",
    ),
    "Patterns": (PATTERNS, "What is removed together: `pattern=`."),
    "Allocations": (ALLOCATIONS, "How much each layer loses: `allocation=`."),
    "Schedules": (SCHEDULES, "How the sparsity grows over the steps: `schedule=`."),
    "Regrowth": (REGROW, "Whether removed weights come back during gradual pruning: `regrow=`."),
    "Solvers": (SOLVERS, "Who chooses the mask and repairs the weights that stay: `solver=`."),
    "Dynamic methods": (DYNAMIC, "What each input decides for itself at run time: `sc.dynamic(model, method=...)`."),
}


def methods_page() -> str:
    """Every registered method with its docstring, source, options and needs."""
    lines = [
        "# Methods",
        "",
        "Everything a recipe can name, and the methods of `sc.dynamic`. This page is written from the registries by "
        "`tools/make_docs.py`; "
        "`secateur methods` prints the same.",
    ]
    for title, (registry, words) in SECTIONS.items():
        lines += ["", f"## {title}", "", words]
        for entry in registry.values():
            lines += ["", f"### {entry.name}", "", inspect.getdoc(entry.make) or "", "", f"Source: {entry.source}."]
            if entry.options:
                lines += ["", "Options: " + ", ".join(f"`{k} = {v!r}`" for k, v in entry.options.items()) + "."]
            needs = sorted(n.value for n in entry.facts.get("needs", ()) if n.value != "weight")
            if needs:
                lines += ["", f"Needs from calibration: {', '.join(needs)}."]
            if "reduction" in entry.facts:
                lines += ["", f"A unit's scores are folded by: {entry.facts['reduction']}."]
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """File -> content."""
    schema = json.dumps(Recipe.json_schema(), indent=2) + "\n"
    return {DOCS / "methods.md": methods_page(), DOCS / "recipe.schema.json": schema}


def main() -> int:
    """Write the pages, or compare them."""
    stale = [path for path, content in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != content]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.name} is out of date: run python tools/make_docs.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages()[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
