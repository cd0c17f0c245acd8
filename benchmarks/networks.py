"""The networks of cpu_sparse.py: trained where trained weights are at hand, pruned by magnitude, with real inputs.

Each is a `Case`: a model in evaluation mode, the inputs it is timed and checked on (the first is timed), and which of its
layers are pruned. Weights or data that are absent raise, with the remedy.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from conditions import ROOT, asset
from torch import Tensor, nn

from secateur.data.load import load_data
from secateur.models import Loaded, load_model

EXAMPLES = ROOT / "examples"
CHECKED = 4  #: inputs on which outputs are compared
CONTEXT = 64  #: tokens already there when SmolLM2 decodes the next


@dataclass
class Case:
    """A pruned network and its inputs, each a tuple of positional arguments."""

    model: nn.Module
    inputs: list[tuple[Tensor, ...]]

    @property
    def example(self) -> Tensor | dict[str, Tensor]:
        """The first input as `secateur.deploy` takes it: a tensor, or tensors by the names of the arguments."""
        names = inspect.signature(self.model.forward).parameters
        first = self.inputs[0]
        return first[0] if len(first) == 1 else dict(zip(names, first, strict=True))


def cifar(size: int, count: int) -> list[Tensor]:
    """Test images of CIFAR-10, each ``[1, 3, size, size]``, normalised."""
    loaded = load_model(f"{EXAMPLES / 'cifar_resnet.py'}:make?depth=20")
    batches = load_data(f"npz:{asset('cifar10_jpeg.npz')}?split=test", loaded=loaded, batch_size=count)
    images, _ = next(iter(batches))
    return [F.interpolate(image[None], size=(size, size), mode="bilinear") for image in images]


@torch.no_grad()
def prune(model: nn.Module, sparsity: float) -> None:
    """The smallest magnitudes of each layer; depthwise, first and last layers of few weights stay, as custom has it."""
    for name, module in model.named_modules():
        narrow = isinstance(module, nn.Conv2d) and (module.groups > 1 or module.in_channels <= 3)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not narrow and not name.endswith("lm_head"):
            flat = module.weight.abs().flatten()
            module.weight.view(-1)[flat.argsort()[: round(sparsity * flat.numel())]] = 0
    model.eval().requires_grad_(False)


@torch.no_grad()
def settle(model: nn.Module, images: list[Tensor]) -> None:
    """BatchNorm statistics of a pruned network from real images: without them a network of random weights says one thing
    whatever it sees, and comparing outputs would prove nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    model(torch.cat(images))
    model.eval()


def untrained(layers: list[nn.Module]) -> Callable[[float], Case]:
    def make(sparsity: float) -> Case:
        torch.manual_seed(0)
        model, images = nn.Sequential(*layers), cifar(64, 32)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        prune(model, sparsity)
        settle(model, images)
        return Case(model, [(image,) for image in images[:CHECKED]])

    return make


def vgg16(sparsity: float) -> Case:
    """Thirteen 3x3 convolutions of 64 to 512 channels with five poolings, untrained."""
    layers: list[nn.Module] = []
    width = 3
    for stage in ([64, 64], [128, 128], [256] * 3, [512] * 3, [512] * 3):
        for out in stage:
            layers += [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            width = out
        layers.append(nn.MaxPool2d(2))
    return untrained([*layers, nn.Flatten(), nn.Linear(512 * 4, 1000)])(sparsity)


def strided(sparsity: float) -> Case:
    """Eight 3x3 convolutions of 64 to 512 channels, every second with stride 2, untrained."""
    layers: list[nn.Module] = []
    width = 3
    for out, stride in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]:
        layers += [nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        width = out
    return untrained([*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)])(sparsity)


def resnet(depth: int) -> Callable[[float], Case]:
    def make(sparsity: float) -> Case:
        model = load_model(f"{EXAMPLES / 'cifar_resnet.py'}:make?depth={depth}").model
        prune(model, sparsity)
        return Case(model, [(image,) for image in cifar(32, CHECKED)])

    return make


def efficientnet(sparsity: float) -> Case:
    """EfficientNet-Lite0 on photographs of 224 x 224."""
    loaded = load_model(f"{EXAMPLES / 'efficientnet_lite0.py'}:make")
    prune(loaded.model, sparsity)
    batches = load_data(f"npz:{asset('imagenet_sample_1000.npz')}[1::250]", loaded=loaded, batch_size=1)
    return Case(loaded.model, [(image,) for image, _ in batches])


class Encoder(nn.Module):
    """Tokens and mask to the last hidden state, as a module that every runtime can take in."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # noqa: D102
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def words(loaded: Loaded, name: str, seqlen: int) -> list[Tensor]:
    """Blocks of real text, each ``[1, seqlen]`` tokens."""
    text = (asset(name)).read_text(encoding="utf-8")[:20000]
    tokens = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[misc]
    return [torch.tensor(tokens[i * seqlen : (i + 1) * seqlen])[None] for i in range(CHECKED)]


def minilm(sparsity: float) -> Case:
    """all-MiniLM-L6-v2 on 128 tokens of WikiText-2."""
    loaded = load_model(f"{EXAMPLES / 'minilm.py'}:make")
    prune(loaded.model, sparsity)
    return Case(Encoder(loaded.model).eval(), [(t, torch.ones_like(t)) for t in words(loaded, "wikitext2/test.txt", 128)])


class NextToken(nn.Module):
    """One step of decoding: a token and the keys and values of all before it, ``[layers, 1, heads, context, width]``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, keys: Tensor, values: Tensor) -> Tensor:  # noqa: D102
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(keys.shape[0]):
            cache.update(keys[layer], values[layer], layer)
        return self.model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]


def smollm2(sparsity: float) -> Case:
    """SmolLM2-135M decoding one token after 64 of WikiText-2; the output layer, which is the embedding, stays dense."""
    loaded = load_model(f"{EXAMPLES / 'smollm2.py'}:make")
    model: Any = loaded.model
    prune(model, sparsity)
    steps = []
    with torch.no_grad():
        for tokens in words(loaded, "wikitext2/test.txt", CONTEXT + 1):
            cache = model(input_ids=tokens[:, :CONTEXT], use_cache=True).past_key_values
            layers = list(itertools.islice(cache.layers, len(cache)))
            keys, values = (torch.stack([getattr(layer, part) for layer in layers]) for part in ("keys", "values"))
            steps.append((tokens[:, CONTEXT:], keys.contiguous(), values.contiguous()))
    return Case(NextToken(model).eval(), steps)


NETWORKS: dict[str, tuple[Callable[[float], Case], tuple[float, ...]]] = {
    "VGG-16, 64 x 64": (vgg16, (0.9, 0.8)),
    "eight 3x3 convolutions, 64 x 64": (strided, (0.9, 0.8)),
    "MiniLM, 128 tokens": (minilm, (0.9, 0.8)),
    "SmolLM2-135M, one token": (smollm2, (0.5, 0.7)),
    "EfficientNet-Lite0, 224 x 224": (efficientnet, (0.9, 0.8)),
    "ResNet-56, 32 x 32": (resnet(56), (0.9,)),
    "ResNet-20, 32 x 32": (resnet(20), (0.9,)),
}


@torch.inference_mode()
def check(model: nn.Module, other: nn.Module, inputs: list[tuple[Tensor, ...]]) -> tuple[float, float]:
    """Largest difference of the two models' outputs, and of one model's outputs on different inputs, over the largest output.

    The second says what the first is worth: a model that ignores its input would pass any comparison.
    """
    expected = [model(*args) for args in inputs]
    scale = max(float(y.abs().max()) for y in expected)
    error = max(float((other(*args) - y).abs().max()) for args, y in zip(inputs, expected, strict=True)) / scale
    apart = min(float((a - b).abs().max()) for a, b in itertools.combinations(expected, 2)) / scale
    return error, apart
