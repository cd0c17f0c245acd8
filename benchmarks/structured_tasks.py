"""The trained networks of benchmarks/structured_accuracy.py, their data, and what Torch-Pruning needs to be told of each."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from conditions import ROOT, asset
from torch import Tensor, nn

from secateur.data.batches import default_loss
from secateur.measure.macs import macs as count

sys.path.append(str(ROOT / "examples"))


@dataclass(frozen=True)
class Task:
    """A dense network and everything that both tools are given alike.

    `cuts` are the calls of sc.prune that make one cut, each the keys of a recipe. `peer` gives the keyword arguments of
    Torch-Pruning's pruner for a model and a pruning ratio.
    """

    name: str
    title: str
    model: nn.Module
    example: Any
    data: list[Any]
    train: list[Any]
    evaluate: Callable[[nn.Module], float]
    cuts: tuple[Mapping[str, Any], ...]
    peer: Callable[[nn.Module, float], dict[str, Any]]
    finetune: Mapping[str, Any]
    loss: Callable[[nn.Module, Any], Tensor] = default_loss
    notes: str = ""

    def macs(self, model: nn.Module) -> float:
        """Multiply-adds on the example."""
        return float(count(model, self.example).dense)


@torch.no_grad()
def correct(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)


def batched(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


@cache
def cifar(split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images of the shuffled split, seed 0, normalised, and their labels; the file is sorted by class."""
    from PIL import Image

    data = np.load(asset("cifar10_jpeg.npz"))
    jpeg, offset, label = (data[f"{split}_{k}"] for k in ("jpeg", "offset", "label"))
    indices = np.random.default_rng(0).permutation(len(label))[:count]
    pictures = [np.asarray(Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes()))) for i in indices]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None], torch.from_numpy(label[indices]).long()


def resnet(depth: int, quick: bool) -> Task:
    """A CIFAR ResNet, of which the inner channels of every block are cut: its option-A shortcuts hold the others."""
    from cifar_resnet import make

    train = batched(*cifar("train", 512 if quick else 2_560), 128)
    test = batched(*cifar("test", 500 if quick else 2_000), 250)

    def peer(model: nn.Module, ratio: float) -> dict[str, Any]:
        inner = {m.conv1 for m in model.modules() if hasattr(m, "conv2")}
        others = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in inner]
        return {"pruning_ratio": ratio, "ignored_layers": others}

    return Task(
        name=f"resnet{depth}",
        title=f"ResNet-{depth} on CIFAR-10",
        model=make(depth).model.eval(),
        example=torch.zeros(1, 3, 32, 32),
        data=train[:4] if quick else train[:10],
        train=train,
        evaluate=lambda model: correct(model, test),
        cuts=({"pattern": "channel", "layers": ["layer*.conv1"], "ignore": ["conv1"]},),
        peer=peer,
        finetune={"epochs": 1, "optimizer": "sgd", "lr": 0.01, "weight_decay": 5e-4},
        notes=(
            "The inner channels of every block are cut. Calibration: 1,280 training images; fine-tuning: one epoch of "
            "2,560 training images with their labels, batches of 128, SGD with Nesterov momentum 0.9, learning rate "
            "0.01 falling along a cosine, weight decay 0.0005; test: 2,000 test images. All of them are the first of the "
            "shuffled split (numpy, seed 0), since the file is sorted by class. The images were compressed as "
            "JPEG after the networks were trained, so the dense accuracy is below the published one, and fine-tuning also "
            "adapts to JPEG: the dense line fine-tuned alike tells the two apart."
        ),
    )


def efficientnet(quick: bool) -> Task:
    """EfficientNet-Lite0, of which the expanded channels of every block are cut."""
    import efficientnet_lite0
    from PIL import Image

    loaded = efficientnet_lite0.make("own")
    model = loaded.model.eval()
    data = np.load(asset("imagenet_sample_1000.npz"))

    def images(start: int) -> tuple[Tensor, Tensor]:
        indices = np.random.default_rng(0).permutation(np.arange(start, 200 if quick else 1000, 2))
        at = data["offset"]
        files = [data["jpeg"][at[i] : at[i + 1]].tobytes() for i in indices]
        pictures = np.stack([np.asarray(Image.open(io.BytesIO(f)).convert("RGB"))[16:240, 16:240] for f in files])
        x = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - 127) / 128
        return x, torch.from_numpy(data["label"][indices]).long()

    calibration, test = batched(*images(0), 25)[:8], batched(*images(1), 25)
    with torch.no_grad():
        taught = [(x, model(x).softmax(1)) for x, _ in calibration]
    inner = [n for n, m in model.named_modules() if n.endswith("_expand_conv")]

    def peer(model: nn.Module, ratio: float) -> dict[str, Any]:
        expand = {model.get_submodule(n) for n in inner}
        others = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in expand]
        others = [m for m in others if getattr(m, "groups", 1) == 1]
        return {"pruning_ratio": ratio, "ignored_layers": others}

    return Task(
        name="efficientnet",
        title="EfficientNet-Lite0 on ImageNet",
        model=model,
        example=torch.zeros(1, 3, 224, 224),
        data=calibration,
        train=taught,
        evaluate=lambda model: correct(model, test),
        cuts=({"pattern": "channel", "layers": inner, "ignore": ["_blocks.*._bn2"]},),
        peer=peer,
        finetune={"epochs": 1, "optimizer": "sgd", "lr": 0.005, "weight_decay": 1e-5},
        notes=(
            "The expanded channels of every block that expands are cut. One image of each class: of those of even number 200 "
            "calibrate and fine-tune, the 500 of odd number judge (one more or less is 0.2 points). No class has images on "
            "both sides, so fine-tuning has no labels: one epoch of cross-entropy with the dense network's outputs, batches "
            "of 25, SGD with Nesterov momentum 0.9, learning rate 0.005 along a cosine. Images are normalised as in training. "
            "Re-estimating BatchNorm statistics from so few images costs this network accuracy by itself (efficientnet.md), "
            "in the columns *norms* of both tools."
        ),
    )


def paragraphs() -> list[str]:
    """Lines of WikiText-2's validation text."""
    return (asset("wikitext2") / "valid.txt").read_text(encoding="utf-8").split("\n")


def sentences() -> list[str]:
    """Whole sentences of SST-2's training text, without their labels: those that end in a full stop."""
    lines = (asset("sst2") / "train.tsv").read_text(encoding="utf-8").split("\n")[1:]
    found = dict.fromkeys(line.partition("\t")[0].strip() for line in lines)
    return [sentence for sentence in found if sentence.endswith(" .")]


def minilm(quick: bool, text: Callable[[], list[str]] = paragraphs) -> Task:
    """all-MiniLM-L6-v2, of which attention heads and feed-forward neurons are cut."""
    import minilm as example
    import stsb

    model = example.make().model.eval()
    lines = [line.strip() for line in text()]
    lines = [line for line in lines if len(line.split()) > 8][: 64 if quick else 512]
    lines = [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]
    batches = [
        dict(stsb.tokenizer()(lines[i : i + 32], padding=True, truncation=True, max_length=64, return_tensors="pt"))
        for i in range(0, len(lines), 32)
    ]
    with torch.no_grad():
        taught = [(batch, stsb.vectors(model, batch)) for batch in batches]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        """Contrast: of all sentences of a batch the dense network's vector of each is to be the nearest to its own."""
        near = stsb.vectors(model, batch[0]) @ batch[1].T / 0.05
        return F.cross_entropy(near, torch.arange(len(near)))

    def peer(model: nn.Module, ratio: float) -> dict[str, Any]:
        cut = {m.intermediate.dense for m in model.encoder.layer}
        for m in model.encoder.layer:
            cut |= {m.attention.self.query, m.attention.self.key, m.attention.self.value}
        heads = {
            p: 12 for m in model.encoder.layer for p in (m.attention.self.query, m.attention.self.key, m.attention.self.value)
        }
        others = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm)) and m not in cut]
        return {
            "pruning_ratio": ratio,
            "ignored_layers": others,
            "num_heads": heads,
            "prune_num_heads": True,
            "prune_head_dims": False,
            "head_pruning_ratio": ratio,
        }

    length = torch.ones(1, 32, dtype=torch.long)
    return Task(
        name="minilm" if text is paragraphs else "minilm_sentences",
        title=f"all-MiniLM-L6-v2 on STS-B, calibrated on {text.__name__}",
        model=model,
        example={"input_ids": length, "attention_mask": length},
        data=taught,
        train=taught,
        evaluate=lambda model: 100 * stsb.spearman(model, 200 if quick else None)["spearman"],
        cuts=({"pattern": "head"}, {"pattern": "channel", "layers": ["encoder.layer.*.intermediate.dense"]}),
        peer=peer,
        finetune={"epochs": 2, "optimizer": "adamw", "lr": 1e-4},
        loss=loss,
        notes=(
            "Attention heads and feed-forward neurons are cut, the same fraction of each. Figures are Spearman's correlation "
            "times 100 on the 1,379 test pairs. Calibration and fine-tuning: 512 "
            + ("lines of WikiText-2's validation text" if text is paragraphs else "sentences of SST-2's training text")
            + ", in batches of 32; the loss, of Taylor and of fine-tuning, asks that each line's vector be nearest to the one "
            "the dense network gives it, among the lines of the batch; two epochs of AdamW, learning rate 0.0001 along a "
            "cosine. Multiply-adds are counted on 32 tokens."
        ),
    )


TASKS: Mapping[str, Callable[[bool], Task]] = {
    "resnet56": lambda quick: resnet(56, quick),
    "resnet20": lambda quick: resnet(20, quick),
    "efficientnet": efficientnet,
    "minilm": minilm,
    "minilm_sentences": lambda quick: minilm(quick, sentences),
}
