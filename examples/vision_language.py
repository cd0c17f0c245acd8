"""Pruning a vision-language model within its modalities by MULTIFLOW, on a small CLIP of random weights: yours comes here.

python examples/vision_language.py
"""

from __future__ import annotations

import torch

import secateur as sc
from secateur.models.torchvision_shim import prepare_torchvision

prepare_torchvision()
from transformers import CLIPConfig, CLIPModel  # noqa: E402

torch.manual_seed(0)
wide = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
text = {**wide, "vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}
config = CLIPConfig(text_config=text, vision_config={**wide, "image_size": 32, "patch_size": 8}, projection_dim=16)
model = CLIPModel(config).eval()
batch = {
    "input_ids": torch.randint(1, 98, (8, 10)),
    "attention_mask": (torch.arange(10) < torch.randint(5, 11, (8, 1))).long(),  # padding is left out of the statistics
    "pixel_values": torch.randn(8, 3, 32, 32),
}

method = {"criterion": "multiflow", "allocation": "magnitude", "groups": "modality", "ignore": ["*.patch_embedding"]}
result = sc.prune(model, method, sparsity=0.75, data=[batch])
for tower in ("vision_model", "text_model"):
    masks = [m for n, m in result.masks.items() if n.startswith(tower)]
    print(tower, f"{sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks):.1%} of the weights are left")
print(*result.report.notes, sep="\n")
