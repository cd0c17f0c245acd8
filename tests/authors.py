"""The authors' formulas of magnitude, Wanda, SparseGPT and ALPS, written plainly on the blocks of a decoder, sharing no code.

One layer at a time, float32, no shortcuts: what the library is compared with, in tests on small models and in
benchmarks/smollm2.py on a real one. SparseGPT's published code removes one weight too many in each block; this does not.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn


def prune_decoder(model: nn.Module, data: list[dict[str, Tensor]], method: str, setting: str) -> float:
    """Prune the linear layers of ``model.model.layers`` in place, block by block; the share of their weights that is gone."""
    removed = total = 0
    with torch.no_grad():
        states = _arguments(model, data)
        for block in model.model.layers:
            linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
            grams = _grams(block, linears, states) if method != "magnitude" else dict.fromkeys(linears)
            for name, linear in linears.items():
                linear.weight.copy_(_solve(linear.weight.clone(), grams[name], method, setting))
                removed += int((linear.weight == 0).sum())
                total += linear.weight.numel()
            for state in states:
                state["hidden"] = _first(block(state["hidden"], **state["kwargs"]))
    return removed / total


def _arguments(model: nn.Module, data: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    states: list[dict[str, Any]] = []

    class Stop(Exception):
        pass

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        states.append({"hidden": args[0] if args else rest.pop("hidden_states"), "kwargs": rest})
        raise Stop

    handle = model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    for batch in data:
        with contextlib.suppress(Stop):
            model(**batch, use_cache=False)
    handle.remove()
    return states


def _grams(block: nn.Module, linears: dict[str, nn.Linear], states: list[dict[str, Any]]) -> dict[str, Tensor]:
    grams = {n: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for n, m in linears.items()}

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: Any) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            grams[name] += rows.t() @ rows

        return add

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
    for state in states:
        block(state["hidden"], **state["kwargs"])
    for handle in handles:
        handle.remove()
    return {n: g.float() for n, g in grams.items()}


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _solve(weight: Tensor, gram: Any, method: str, setting: str) -> Tensor:
    if method == "magnitude":
        return weight * _best(weight.abs(), setting, rows=False)
    if method == "wanda":
        return weight * _best(weight.abs() * gram.diagonal().sqrt(), setting, rows=True)
    if method == "sparsegpt":
        return _sparsegpt(weight, gram, setting)
    return _alps(weight, gram, setting)


def _best(scores: Tensor, setting: str, *, rows: bool) -> Tensor:
    """Mask of what stays: n of every m inputs, or a share of each row or of all."""
    if ":" in setting:
        keep, of = map(int, setting.split(":"))
        groups = scores.reshape(-1, of)
    else:
        groups = scores if rows else scores.reshape(1, -1)
        keep = groups.shape[1] - int(float(setting) * groups.shape[1] + 0.5)
    chosen = groups.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(groups).scatter_(1, chosen, 1.0).reshape(scores.shape)


def _sparsegpt(weight: Tensor, gram: Tensor, setting: str, block: int = 128) -> Tensor:
    form = (gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))).double()  # in float32 the inverse may be indefinite
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(form)), upper=True).float()
    of = int(setting.split(":")[1]) if ":" in setting else 0
    for a in range(0, weight.shape[1], block):
        b = min(a + block, weight.shape[1])
        errors = torch.zeros(len(weight), b - a)
        diagonal = upper.diagonal()[a:b]
        mask = torch.ones(len(weight), b - a) if of else _best((weight[:, a:b] / diagonal).square(), setting, rows=False)
        for j in range(b - a):
            if of and j % of == 0:
                part = weight[:, a + j : a + j + of] / diagonal[j : j + of]
                mask[:, j : j + of] = _best(part.square(), setting, rows=False)
            gone = weight[:, a + j] * (1 - mask[:, j])
            errors[:, j] = gone / diagonal[j]
            weight[:, a + j : b] -= errors[:, j, None] * upper[a + j, a + j : b]
            weight[:, a + j] *= mask[:, j]
        weight[:, b:] -= errors @ upper[a:b, b:]
    return weight


def _alps(weight: Tensor, gram: Tensor, setting: str) -> Tensor:
    """ADMM on one eigendecomposition, the penalty growing until the support stands still, then conjugate gradients on it."""
    form = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    scale = form.diagonal().sqrt()
    form, dense = form / scale / scale[:, None], weight * scale
    values, vectors = torch.linalg.eigh(form)
    pull, dual, rho = dense @ form, torch.zeros_like(dense), 0.1
    mask = before = _best(dense.square(), setting, rows=False)
    sparse = dense * mask
    for step in range(1, 301):
        current = ((pull - dual + rho * sparse) @ vectors) / (values + rho) @ vectors.t()
        mask = _best((current + dual / rho).square(), setting, rows=False)
        sparse = (current + dual / rho) * mask
        dual = dual + rho * (current - sparse)
        if step % 3 == 0:
            moved, size = int((mask != before).sum()), float(mask.sum())
            if moved < 1:
                break
            rho *= 1.3 if moved >= 0.1 * size else 1.2 if moved >= 0.005 * size else 1.1
            before = mask
    return _descend(form, dense, sparse, mask, 10) / scale


def _descend(form: Tensor, dense: Tensor, sparse: Tensor, mask: Tensor, steps: int) -> Tensor:
    residual = ((dense - sparse) @ form) * mask
    direction, product = residual, residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ form) * mask
        length = product / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        sparse, residual = sparse + length * direction, residual - length * image
        product, last = residual.square().sum(1, keepdim=True), product
        direction = residual + product / last.clamp_min(1e-30) * direction
    return sparse
