"""Which weights of a model can be pruned, by which name, and how each is turned to ``[out, in, *kernel]`` and back."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import LayerError, NonFiniteError, UnknownName
from secateur.sharded import whole

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layer:
    """One prunable weight. `name` is the parameter's name in the model, `swap` says that it is stored ``[in, out, ...]``."""

    name: str
    module_name: str
    module: nn.Module
    parameter: nn.Parameter
    swap: bool = False
    aliases: tuple[str, ...] = ()  #: other names of the same parameter, where it is tied

    @property
    def bias(self) -> str | None:
        """Name of the bias that belongs to the weight, one value for each output, or None where there is none."""
        bias = getattr(self.module, "bias", None)
        if not isinstance(bias, nn.Parameter) or bias.shape != self.shape[:1]:
            return None
        return f"{self.module_name}.bias" if self.module_name else "bias"

    @property
    def shape(self) -> torch.Size:
        """Canonical shape."""
        return self.canonical(self.parameter).shape

    @property
    def reads_input(self) -> bool:
        """Whether what the weight multiplies is what its module is given: in linear layers and convolutions."""
        return isinstance(self.module, (nn.Linear, *CONVOLUTIONS)) or is_conv1d(self.module)

    @property
    def groups(self) -> int:
        """Into how many equal shares the outputs fall that have inputs of their own: groups of a convolution, or q, k and v."""
        if isinstance(self.module, nn.MultiheadAttention):
            return 3 if self.name.endswith("in_proj_weight") else 1
        return int(getattr(self.module, "groups", 1)) if isinstance(self.module, CONVOLUTIONS) else 1

    def stored_dim(self, canonical: int) -> int:
        """The stored dimension of the canonical dimension 0 or 1."""
        return 1 - canonical if self.swap else canonical

    def canonical(self, tensor: Tensor) -> Tensor:
        """A tensor in the parameter's own layout, seen as ``[out, in, *kernel]``."""
        return tensor.transpose(0, 1) if self.swap else tensor

    def stored(self, tensor: Tensor) -> Tensor:
        """The inverse of `canonical`."""
        return tensor.transpose(0, 1).contiguous() if self.swap else tensor


def find_layers(
    model: nn.Module, *, layers: Sequence[str] | None = None, ignore: Sequence[str] = ()
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Prunable weights by parameter name, in the model's order, and the ones left alone with the reason.

    By default these are the weights of linear, convolution, recurrent and attention-projection modules. `layers` and
    `ignore` hold parameter or module names, or shell patterns of them (``"layer4.*"``); a module's name stands for all
    that is below it. Raises UnknownName where one of them matches nothing.
    """
    candidates, skipped = _candidates(model, explicit=layers is not None)
    names = [*candidates, *skipped]
    for pattern in (*(layers or ()), *ignore):
        if not any(matches(pattern, n) for n in names):
            modules = {n for n, _ in model.named_modules()}
            raise UnknownName("layer", pattern, {*names, *(m for m in modules if any(n.startswith(m + ".") for n in names))})
    found: dict[str, Layer] = {}
    for name, layer in candidates.items():
        if layers is not None and not any(matches(p, name) for p in layers):
            skipped[name] = "not among the layers asked for"
        elif any(matches(p, name) for p in ignore):
            skipped[name] = "ignored as asked"
        elif reason := _unfit(layer):
            skipped[name] = reason
        else:
            found[name] = layer
    if layers is not None:
        for name in [n for n in skipped if n not in candidates and any(matches(p, n) for p in layers)]:
            raise LayerError(f"layer {name!r} was asked for but cannot be pruned: {skipped[name]}")
    return found, skipped


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` names the parameter `name`, a module above it, or matches either as a shell pattern."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def check_finite(layers: Iterable[Layer]) -> None:
    """Raise NonFiniteError naming the first weight that holds NaN or infinite values, and how many."""
    for layer in layers:
        weight = whole(layer.parameter.detach())
        low, high = torch.aminmax(weight)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise NonFiniteError(non_finite_message(f"the weight {layer.name!r}", weight))


def non_finite_message(what: str, tensor: Tensor) -> str:
    """The sentence that says how many values of `tensor` are NaN and how many infinite."""
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return f"{what}, shape {tuple(tensor.shape)}, has {nan} NaN and {inf} infinite values. Repair or retrain it before pruning."


def _candidates(model: nn.Module, *, explicit: bool) -> tuple[dict[str, Layer], dict[str, str]]:
    aliases: dict[int, list[str]] = {}
    modules: dict[nn.Module, str] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(module, module_name)
        for local, parameter in module._parameters.items():
            if parameter is not None:
                aliases.setdefault(id(parameter), []).append(f"{module_name}.{local}" if module_name else local)
    embeddings = {id(m.weight): n for m, n in modules.items() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    found: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    seen: set[int] = set()
    for module, module_name in modules.items():
        for local, parameter in module._parameters.items():
            name = f"{module_name}.{local}" if module_name else local
            if parameter is None or id(parameter) in seen:
                continue
            prunable, swap = _is_weight(module, local)
            if not prunable:
                if explicit and parameter.dim() >= 2:
                    found[name] = Layer(name, module_name, module, parameter)
                continue
            seen.add(id(parameter))
            if id(parameter) in embeddings:
                skipped[name] = f"tied to the embedding {embeddings[id(parameter)]!r}: pruning it would prune the embedding"
                continue
            others = tuple(n for n in aliases[id(parameter)] if n != name)
            found[name] = Layer(name, module_name, module, parameter, swap, others)
    return found, skipped


def _is_weight(module: nn.Module, local: str) -> tuple[bool, bool]:
    """Whether parameter `local` of `module` is a weight by which inputs are multiplied, and whether it is stored [in, out]."""
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return local == "weight", False
    if isinstance(module, nn.Bilinear):
        return False, False
    if isinstance(module, TRANSPOSED):
        return local == "weight", module.groups == 1
    if isinstance(module, nn.RNNBase):
        return local.startswith("weight_"), False
    if isinstance(module, (nn.RNNCellBase,)):
        return local.startswith("weight_"), False
    if isinstance(module, nn.MultiheadAttention):
        return local in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), False
    if is_conv1d(module):
        return local == "weight", True
    return False, False


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is stored transposed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _unfit(layer: Layer) -> str | None:
    parameter = layer.parameter
    if parameter.is_meta:
        raise LayerError(f"the weight {layer.name!r} is on the meta device and has no values. Load the weights before pruning.")
    if parameter.is_complex():
        return f"complex weights ({parameter.dtype}) have no order to prune by"
    if not parameter.is_floating_point():
        return f"{parameter.dtype} weights are quantised; prune before quantising"
    if parameter.numel() == 0:
        return f"it is empty: shape {tuple(parameter.shape)}"
    return None
