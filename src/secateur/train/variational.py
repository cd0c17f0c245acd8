"""Sparse variational dropout: noise on every weight, of a size that is learnt; weights that drown in it are removed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import LayerError
from secateur.layers import find_layers
from secateur.types import MaskSet

_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695  # of the approximation of the divergence, eq. 14
_START = -10.0  # log variance at the start: the paper's
_RANGE = (-20.0, 4.0)  # of the log variance, and of log alpha below: numbers beyond change nothing and overflow
_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class Variational:
    """Gaussian noise on the weights of linear and convolution layers while a model is in training mode.

    Each weight has a variance of its own, trained with it: give the optimizer `parameters` too, and add ``divergence()``, times
    a factor that rises from 0 to 1, to the loss *summed over the whole training set* (or both divided by its size). The
    outputs' noise is drawn, not the weights' (local reparametrisation). Afterwards ``masks()`` are what is worth keeping.
    In eval mode the layers are as they are. A context manager: the model is clean after the block.

    Args:
        model: trained already, best; from scratch, let the factor rise slowly.
        layers: names or shell patterns; all linear and convolution layers by default.
        ignore: the same, of what is left alone.

    Source: Molchanov et al. 2017, Variational Dropout Sparsifies Deep Neural Networks, eq. 13, 14 and 17.

    Raises LayerError where there is no such layer.

    Example:
        >>> model = nn.Linear(8, 4)
        >>> with Variational(model) as noise:
        ...     optimizer = torch.optim.Adam([*model.parameters(), *noise.parameters()], lr=1e-3)
        ...     loss = model(torch.ones(2, 8)).square().mean() + noise.divergence() / 1000
        ...     loss.backward()
        ...     optimizer.step()
        >>> noise.masks().sparsity()
        0.0
    """

    def __init__(self, model: nn.Module, *, layers: Sequence[str] | None = None, ignore: Sequence[str] = ()):
        found, _ = find_layers(model, layers=layers, ignore=ignore)
        self._layers = {n: la for n, la in found.items() if type(la.module) is nn.Linear or type(la.module) in _CONVOLUTIONS}
        if not self._layers:
            raise LayerError("variational dropout: the model has no linear or convolution layer among those asked for")
        self._log_variance = {n: nn.Parameter(torch.full_like(la.parameter, _START)) for n, la in self._layers.items()}
        self._handles: list[Any] = []

    def __enter__(self) -> Variational:
        for name, layer in self._layers.items():
            self._handles.append(layer.module.register_forward_hook(self._noise(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def parameters(self) -> Iterator[nn.Parameter]:
        """Log variances, each of the shape of its weight: to be given to the optimizer."""
        return iter(self._log_variance.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Log variances by the weights' names."""
        return {name: value.detach() for name, value in self._log_variance.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from saved log variances."""
        for name, value in self._log_variance.items():
            value.copy_(state[name])

    def divergence(self) -> Tensor:
        """Kullback-Leibler divergence of the weights from the log-uniform prior, summed over all weights (eq. 14)."""
        return torch.stack([_divergence(self.log_alpha(name)).sum() for name in self._layers]).sum()

    def log_alpha(self, name: str) -> Tensor:
        """Log of variance over squared weight, of each weight of a layer: high where a weight is nothing but noise."""
        squared = self._layers[name].parameter.square().clamp_min(1e-16)
        return (self._log_variance[name].clamp(*_RANGE) - squared.log()).clamp(-10.0, 10.0)

    @torch.no_grad()
    def masks(self, threshold: float = 3.0) -> MaskSet:
        """Keep the weights whose log alpha is at most `threshold`; 3, the paper's, is a dropout rate of 95%."""
        return MaskSet({name: self.log_alpha(name) <= threshold for name in self._layers})

    def _noise(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not module.training:
                return None
            variance = self._log_variance[name].clamp(*_RANGE).exp()
            return output + (_spread(module, args[0], variance) + 1e-16).sqrt() * torch.randn_like(output)

        return hook


def _spread(module: Any, x: Tensor, variance: Tensor) -> Tensor:
    """Variance of the outputs: the layer with the weights' variances, on squared inputs, without bias."""
    if isinstance(module, nn.Linear):
        return F.linear(x.square(), variance)
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    convolve = _CONVOLUTIONS[type(module)]
    return convolve(x.square(), variance, None, module.stride, padding, module.dilation, module.groups)


def _divergence(log_alpha: Tensor) -> Tensor:
    """Of each weight; 0 where alpha is infinite."""
    return _K1 - _K1 * torch.sigmoid(_K2 + _K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)
