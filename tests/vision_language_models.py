"""Small vision-language models of random weights, each with a batch of three samples, of which one is padded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.torchvision_shim import prepare_torchvision

WIDE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURE = {"image_size": 16, "patch_size": 8}
WORDS = {"vocab_size": 50, "max_position_embeddings": 16}
TOKENS = 6
NAMES = ("blip", "clip", "llava", "siglip")


def make(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model by its name, in evaluation mode, and a batch for it."""
    prepare_torchvision()
    torch.manual_seed(0)
    model = {"blip": _blip, "clip": _clip, "llava": _llava, "siglip": _siglip}[name]()
    return model.eval(), batch(name)


def batch(name: str) -> dict[str, Tensor]:
    """Three samples, the last with two tokens of padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 40, (3, TOKENS), generator=generator)
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[2, -2:] = 0
    if name == "llava":
        ids = torch.cat([ids[:, :1], torch.full((3, 4), 45), ids[:, 1:]], 1)  # four places for the image
        mask = torch.cat([torch.ones(3, 4, dtype=torch.long), mask], 1)
    ids[mask == 0] = 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {**WIDE, **WORDS, "eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**WIDE, **PICTURE}, projection_dim=8))


def _siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    return SiglipModel(SiglipConfig(text_config={**WIDE, **WORDS}, vision_config={**WIDE, **PICTURE}))


def _blip() -> nn.Module:
    from transformers import BlipConfig, BlipForImageTextRetrieval

    text: dict[str, Any] = {
        **WIDE,
        **WORDS,
        "encoder_hidden_size": 16,
        "eos_token_id": 49,
        "bos_token_id": 48,
        "sep_token_id": 47,
    }
    config = BlipConfig(text_config=text, vision_config={**WIDE, **PICTURE}, projection_dim=8, image_text_hidden_size=8)
    return BlipForImageTextRetrieval(config)


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**WIDE, **WORDS, num_key_value_heads=2)
    vision = CLIPVisionConfig(**WIDE, **PICTURE)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=45))
