"""Small configurations of families of transformers, and an example for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_TEXT = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "pad_token_id": 0,
}
_GQA = _TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}
_VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
_MOE = _GQA | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SEQ = {
    "vocab_size": 99, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64, "pad_token_id": 0, "decoder_start_token_id": 1,
}  # fmt: skip

#: family -> (configuration class, model class, options, kind of example)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _TEXT, "text"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _TEXT, "text"),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", _TEXT | {"embedding_size": 32}, "text"),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", {"vocab_size": 99, "dim": 64,
        "n_layers": 2, "n_heads": 4, "hidden_dim": 96}, "text"),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", _TEXT | {"embedding_size": 32}, "text"),
    "deberta": ("DebertaConfig", "DebertaForSequenceClassification", _TEXT, "text"),
    "deberta_v2": ("DebertaV2Config", "DebertaV2ForSequenceClassification", _TEXT, "text"),
    "mpnet": ("MPNetConfig", "MPNetForSequenceClassification", _TEXT, "text"),
    "camembert": ("CamembertConfig", "CamembertForSequenceClassification", _TEXT, "text"),
    "xlm_roberta": ("XLMRobertaConfig", "XLMRobertaForSequenceClassification", _TEXT, "text"),
    "modernbert": ("ModernBertConfig", "ModernBertForSequenceClassification", _TEXT, "text"),
    "funnel": ("FunnelConfig", "FunnelForSequenceClassification", {"vocab_size": 99, "block_sizes": [1, 1], "d_model":
        64, "n_head": 4, "d_head": 16, "d_inner": 96}, "text"),
    "squeezebert": ("SqueezeBertConfig", "SqueezeBertForSequenceClassification", _TEXT | {"embedding_size": 64,
        "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1, "intermediate_groups": 2,
        "output_groups": 2}, "text"),
    "mobilebert": ("MobileBertConfig", "MobileBertForSequenceClassification", _TEXT | {"embedding_size": 32,
        "true_hidden_size": 32, "intra_bottleneck_size": 32}, "text"),
    "fnet": ("FNetConfig", "FNetForSequenceClassification", {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers":
        2, "intermediate_size": 96}, "text"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4,
        "n_positions": 64}, "text"),
    "gpt_neo": ("GPTNeoConfig", "GPTNeoForCausalLM", {"vocab_size": 99, "hidden_size": 64, "num_layers": 2,
        "num_heads": 4, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}, "text"),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _TEXT, "text"),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4,
        "rotary_dim": 8, "n_positions": 64}, "text"),
    "opt": ("OPTConfig", "OPTForCausalLM", {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64}, "text"),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"vocab_size": 99, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "text"),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4,
        "rotary_dim": 8, "n_positions": 64}, "text"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GQA, "text"),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GQA, "text"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GQA, "text"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GQA | {"head_dim": 16}, "text"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _GQA | {"head_dim": 16}, "text"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GQA | {"head_dim": 16}, "text"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GQA | {"head_dim": 16}, "text"),
    "phi": ("PhiConfig", "PhiForCausalLM", _GQA, "text"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _GQA, "text"),
    "falcon": ("FalconConfig", "FalconForCausalLM", {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}, "text"),
    "falcon_mqa": ("FalconConfig", "FalconForCausalLM", {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "multi_query": True}, "text"),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", _GQA, "text"),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", _GQA, "text"),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {"vocab_size": 99, "n_embd": 64, "n_layer": 2,
        "n_head": 4, "n_positions": 64}, "text"),
    "mpt": ("MptConfig", "MptForCausalLM", {"vocab_size": 99, "d_model": 64, "n_layers": 2, "n_heads": 4,
        "max_seq_len": 64}, "text"),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", _GQA, "text"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _GQA, "text"),
    "cohere": ("CohereConfig", "CohereForCausalLM", _GQA, "text"),
    "granite": ("GraniteConfig", "GraniteForCausalLM", _GQA, "text"),
    "glm": ("GlmConfig", "GlmForCausalLM", _GQA | {"head_dim": 16}, "text"),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", _GQA, "text"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _MOE, "text"),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", _MOE | {"shared_expert_intermediate_size": 32}, "text"),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", _MOE, "text"),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2,
        "state_size": 8}, "text"),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2,
        "state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8}, "text"),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2,
        "attention_hidden_size": 64, "intermediate_size": 96}, "text"),
    "xlnet": ("XLNetConfig", "XLNetForSequenceClassification", {"vocab_size": 99, "d_model": 64, "n_layer": 2,
        "n_head": 4, "d_inner": 96}, "text"),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 96,
        "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}, "seq"),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 96,
        "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}, "seq"),
    "bart": ("BartConfig", "BartForConditionalGeneration", _SEQ, "seq"),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", _SEQ, "seq"),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", _SEQ, "seq"),
    "marian": ("MarianConfig", "MarianMTModel", _SEQ, "seq"),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", _SEQ | {"num_mel_bins": 16,
        "max_source_positions": 16, "max_target_positions": 32}, "whisper"),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", _TEXT | {"conv_dim": [32, 32], "conv_stride":
        [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4}, "audio"),
    "hubert": ("HubertConfig", "HubertForSequenceClassification", _TEXT | {"conv_dim": [32, 32], "conv_stride": [5,
        2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4}, "audio"),
    "vit": ("ViTConfig", "ViTForImageClassification", _VISION, "image"),
    "deit": ("DeiTConfig", "DeiTForImageClassification", _VISION, "image"),
    "beit": ("BeitConfig", "BeitForImageClassification", _VISION, "image"),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", _VISION, "image"),
    "swin": ("SwinConfig", "SwinForImageClassification", {"image_size": 32, "patch_size": 2, "embed_dim": 32,
        "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, "image"),
    "swinv2": ("Swinv2Config", "Swinv2ForImageClassification", {"image_size": 32, "patch_size": 2, "embed_dim": 32,
        "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, "image"),
    "convnext": ("ConvNextConfig", "ConvNextForImageClassification", {"hidden_sizes": [16, 32, 48, 64], "depths": [1,
        1, 2, 1]}, "image"),
    "convnextv2": ("ConvNextV2Config", "ConvNextV2ForImageClassification", {"hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 2, 1]}, "image"),
    "segformer": ("SegformerConfig", "SegformerForSemanticSegmentation", {"hidden_sizes": [16, 32, 48, 64], "depths":
        [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4], "decoder_hidden_size": 32}, "image64"),
    "pvt": ("PvtConfig", "PvtForImageClassification", {"image_size": 64, "hidden_sizes": [16, 32, 48, 64], "depths":
        [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4]}, "image64"),
    "resnet": ("ResNetConfig", "ResNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32, 48,
        64], "depths": [1, 1, 2, 1]}, "image64"),
    "regnet": ("RegNetConfig", "RegNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32, 48,
        64], "depths": [1, 1, 2, 1], "groups_width": 8}, "image64"),
    "mobilevit": ("MobileViTConfig", "MobileViTForImageClassification", {"image_size": 64}, "image64"),
    "efficientnet": ("EfficientNetConfig", "EfficientNetForImageClassification", {"image_size": 64,
        "width_coefficient": 0.5, "hidden_dim": 640, "depth_coefficient": 0.5}, "image64"),
    "yolos": ("YolosConfig", "YolosForObjectDetection", _VISION | {"image_size": [32, 32], "num_detection_tokens": 5},
        "image"),
    "dpt": ("DPTConfig", "DPTForSemanticSegmentation", _VISION | {"num_hidden_layers": 4, "backbone_out_indices": [0,
        1, 2, 3], "neck_hidden_sizes": [16, 32, 48, 48], "fusion_hidden_size": 32}, "image"),
    "clip": ("CLIPConfig", "CLIPModel", {"text_config": _TEXT | {"max_position_embeddings": 16}, "vision_config":
        _VISION, "projection_dim": 32}, "both"),
    "siglip": ("SiglipConfig", "SiglipModel", {"text_config": _TEXT | {"max_position_embeddings": 16,
        "projection_size": 64}, "vision_config": _VISION}, "both"),
    "blip": ("BlipConfig", "BlipForConditionalGeneration", {"text_config": _TEXT | {"encoder_hidden_size": 64,
        "max_position_embeddings": 32, "bos_token_id": 1, "sep_token_id": 2}, "vision_config": _VISION,
        "projection_dim": 32}, "both"),
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration", {"text_config": {"model_type": "llama"} | _GQA,
        "vision_config": {"model_type": "clip_vision_model"} | _VISION, "image_token_index": 98,
        "vision_feature_select_strategy": "default"}, "llava"),
    "vilt": ("ViltConfig", "ViltModel", _TEXT | _VISION, "both"),
    "time_series": ("PatchTSTConfig", "PatchTSTForPrediction", {"num_input_channels": 2, "context_length": 32,
        "patch_length": 8, "patch_stride": 8, "d_model": 64, "num_attention_heads": 4, "ffn_dim": 96,
        "num_hidden_layers": 2, "prediction_length": 8}, "series"),
}  # fmt: skip


def build(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model with random weights, and an example for it."""
    import transformers

    config_name, model_name, options, kind = FAMILIES[family]
    config = getattr(transformers, config_name)(**options)
    for name in ("use_cache", "output_hidden_states", "output_attentions"):
        if hasattr(config, name):
            setattr(config, name, False)
    return getattr(transformers, model_name)(config).eval(), _example(kind)


def _example(kind: str) -> dict[str, Any]:
    ids = torch.randint(3, 90, (2, 12))
    if kind == "text":
        return {"input_ids": ids}
    if kind == "seq":
        return {"input_ids": ids, "decoder_input_ids": torch.randint(3, 90, (2, 7))}
    if kind == "whisper":
        return {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": ids}
    if kind == "audio":
        return {"input_values": torch.randn(2, 800)}
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    if kind == "image64":
        return {"pixel_values": torch.randn(2, 3, 64, 64)}
    if kind == "both":
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}
    if kind == "llava":
        return {"input_ids": torch.cat([torch.full((1, 16), 98), ids[:1]], 1), "pixel_values": torch.randn(1, 3, 32, 32)}
    if kind == "series":
        return {"past_values": torch.randn(2, 32, 2)}
    raise ValueError(kind)
