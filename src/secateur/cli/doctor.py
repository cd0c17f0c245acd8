"""``secateur doctor``: what this machine has, what is missing, and the line that installs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

from secateur.cli import options as o
from secateur.cli.console import out, print_json

NEEDS_ARGUMENTS = False
#: Optional package -> the extra that brings it and what it is for.
OPTIONAL = {
    "sklearn": ("demo", "the handwritten digits of the demo"),
    "transformers": ("hf", "models with hf:"),
    "accelerate": ("hf", "loading large models with hf:"),
    "gguf": ("hf", "models stored as GGUF"),
    "timm": ("vision", "models with timm:"),
    "torchvision": ("vision", "models with torchvision:"),
    "PIL": ("vision", "image folders and JPEG data"),
    "scipy": ("sparse", "SciPy sparse matrices"),
}


def command(json: o.Json = False) -> None:
    """Check this machine: versions, cores, memory, accelerators, optional packages. Status 1 where a must is missing."""
    import typer

    checks = examine()
    if json:
        print_json(checks)
    else:
        for check in checks:
            sign = {"ok": "[green]ok[/green]     ", "missing": "[yellow]missing[/yellow]", "bad": "[red]bad[/red]    "}[
                check["state"]
            ]
            out.print(f"{sign} {check['what']}: {check['found']}", markup=True, soft_wrap=True)
            if check["remedy"]:
                out.print(f"        {check['remedy']}", markup=False, soft_wrap=True)
    if any(c["state"] == "bad" for c in checks):
        raise typer.Exit(1)


def examine() -> list[dict[str, str]]:
    """One entry a check: what, found, state (ok, missing, bad) and the remedy."""
    from secateur.report.build import environment

    checks = [_check(key, value) for key, value in environment().items() if key not in ("Seed", "Date")]
    checks += [_torch(), _memory(), _accelerator(), _kernels()]
    for package, (extra, purpose) in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            checks.append(_check(package, f"not installed; it is for {purpose}", "missing", f"pip install 'secateur[{extra}]'"))
        else:
            checks.append(_check(package, _version(package)))
    return checks


def _check(what: str, found: Any, state: str = "ok", remedy: str = "") -> dict[str, str]:
    return {"what": what, "found": str(found), "state": state, "remedy": remedy}


def _version(package: str) -> str:
    names = importlib.metadata.packages_distributions().get(package, [package])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


def _torch() -> dict[str, str]:
    import torch

    major, minor = (int(p) for p in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 10):
        return _check("torch version", torch.__version__, "bad", "pip install 'torch>=2.10'")
    works = torch.ones(2, 2) @ torch.ones(2, 2)
    return _check("torch computes", "yes" if works.sum() == 8 else "no", "ok" if works.sum() == 8 else "bad")


def _memory() -> dict[str, str]:
    import os

    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return _check("memory", "unknown on this system")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _check("memory", f"{total / 1e9:.1f} GB")


def _kernels() -> dict[str, str]:
    from secateur.runtime.native import instruction_sets, missing

    if why := missing():
        return _check("sparse kernels", why, "missing", "install a C++20 compiler and CMake, then install secateur again")
    return _check("sparse kernels", ", ".join(instruction_sets()))


def _accelerator() -> dict[str, str]:
    import torch

    if torch.cuda.is_available():
        return _check("accelerator", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))
    if torch.backends.mps.is_available():
        return _check("accelerator", "Apple GPU (mps)")
    return _check("accelerator", "none: everything runs on the CPU")
