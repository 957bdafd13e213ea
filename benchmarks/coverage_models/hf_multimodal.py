"""Multimodal models of transformers: tiny configurations and their published number of residual blocks."""

from __future__ import annotations

from typing import Any

import torch

from .hf_rows import Inputs, Row, both, image, tensor, text

TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "projection_dim": 16,
}  # fmt: skip
SIGHT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 16, "num_channels": 3, "projection_dim": 16,
}  # fmt: skip
LLAMA: dict[str, Any] = {key: value for key, value in TEXT.items() if key != "projection_dim"} | {
    "model_type": "llama", "num_key_value_heads": 2,
}  # fmt: skip
CLIP: dict[str, Any] = SIGHT | {"model_type": "clip_vision_model"}
SIGLIP: dict[str, Any] = {key: value for key, value in SIGHT.items() if key != "projection_dim"} | {
    "model_type": "siglip_vision_model"
}
TOWERS = "2 per layer of either tower, 2 layers each"
PAIR = both(text(), image())


def _towers(model: str, blocks: int = 8, why: str = TOWERS, inputs: Inputs = PAIR, **more: Any) -> Row:
    return Row(model, inputs, blocks, why, {"text_config": TEXT, "vision_config": SIGHT, "projection_dim": 16} | more)


def _with_image_tokens(token: int, count: int, size: int = 32, extra: int = 0) -> Inputs:
    """Make text in which ``count`` places per sample stand for the image's patches."""

    def make() -> dict[str, Any]:
        ids = torch.randint(5, 90, (2, count + 4))
        ids[:, 1 : 1 + count] = token
        pixels = image(size)()["pixel_values"]
        return {"input_ids": ids, "pixel_values": pixels.unsqueeze(1) if extra else pixels}

    return make


MULTIMODAL: list[Row] = [
    _towers("CLIPModel", why=TOWERS + " (Radford 2021)"),
    _towers("SiglipModel", 9, TOWERS + "; 1 in the pooling head (x + mlp(norm(x)))"),
    _towers("AltCLIPModel"),
    _towers("ChineseCLIPModel"),
    _towers("CLIPSegForImageSegmentation", 12, TOWERS + "; 2 per decoder layer (2); its sums of towers are long",
        extract_layers=[0, 1], reduce_dim=16,
        decoder_num_attention_heads=4, decoder_intermediate_size=32),
    Row("GroupViTModel", PAIR, 18, "2 per text (2) and vision layer (3); per grouping block (2) cross-attention 2, "
        "assignment, MLP (Xu 2022)",
        {"text_config": TEXT, "projection_dim": 16, "projection_intermediate_dim": 32,
         "vision_config": SIGHT | {"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0],
             "patch_size": 8}}),
    _towers("BlipModel"),
    _towers("BlipForImageTextRetrieval", 10, "2 per vision layer, 3 per text layer (cross-attention)"),
    _towers("OwlViTModel"),
    _towers("XCLIPModel", 12, "2 per text layer, 3 per vision layer (message token), 1 around the video "
        "transformer, 1 around the prompt generator (Ni 2022)",
        both(text(), tensor("pixel_values", 2, 2, 3, 32, 32)),
        vision_config=SIGHT | {"num_frames": 2, "mit_hidden_size": 16, "mit_intermediate_size": 32,
         "mit_num_hidden_layers": 1, "mit_num_attention_heads": 4},
        prompt_num_attention_heads=4),
    Row("AlignModel", both(text(), image(64)), 13, "2 per text layer; EfficientNet-B0's 9",
        {"text_config": TEXT, "projection_dim": 80,
         "vision_config": {"width_coefficient": 0.25, "depth_coefficient": 1.0, "image_size": 64, "hidden_dim": 80}}),
    Row("ViltModel", PAIR, 4, "2 per layer", TEXT | SIGHT | {"max_position_embeddings": 40, "max_image_length": -1}),
    Row("FlavaModel", PAIR, 12, "2 per layer, 2 layers each of text, image, multimodal",
        {"text_config": TEXT, "image_config": SIGHT, "multimodal_config": SIGHT, "hidden_size": 32}),
    Row("VisualBertModel", both(text(), tensor("visual_embeds", 2, 4, 32)), 4, "2 per layer",
        TEXT | {"visual_embedding_dim": 32}),
    Row("LxmertModel", both(text(), tensor("visual_feats", 2, 4, 16), lambda: {"visual_pos": torch.rand(2, 4, 4)}),
        2 * 2 + 2 * 2 + 6, "2 per language and per visual layer, cross layers 3 per modality (shared cross-attention)",
        TEXT | {"l_layers": 2, "r_layers": 2, "x_layers": 1, "visual_feat_dim": 16}),
    Row("BridgeTowerModel", PAIR, 20, "2 per text and vision layer, 3 per cross-modal layer (2 of each modality)",
        {"text_config": TEXT | {"hidden_size": 64}, "vision_config": SIGHT | {"hidden_size": 64}, "hidden_size": 64,
         "num_attention_heads": 4,
         "num_hidden_layers": 2}),
    Row("LayoutLMv3Model", text(), 4, "2 per layer", TEXT | {"coordinate_size": 4, "shape_size": 8,
         "visual_embed": False}),
    Row("GitForCausalLM", PAIR, 8, TOWERS, TEXT | {"vision_config": SIGHT}),
    Row("LlavaForConditionalGeneration", _with_image_tokens(98, 4), 8, TOWERS,
        {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": 98, "image_token_id": 98,
         "vision_feature_layer": -1}),
    Row("PaliGemmaForConditionalGeneration", _with_image_tokens(98, 4), 8, TOWERS,
        {"text_config": LLAMA | {"model_type": "gemma", "head_dim": 8}, "image_token_index": 98, "image_token_id": 98,
         "projection_dim": 32, "vision_config": SIGLIP | {"vision_use_head": False}}),
    Row("Gemma3ForConditionalGeneration", _with_image_tokens(98, 4), 8, TOWERS,
        {"text_config": LLAMA | {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4},
         "vision_config": SIGLIP | {"patch_size": 8, "vision_use_head": False}, "image_token_index": 98,
         "image_token_id": 98, "mm_tokens_per_image": 4, "boi_token_index": 96, "eoi_token_index": 97}),
    Row("IdeficsForVisionText2Text", lambda: text()() | {
         "pixel_values": torch.randn(2, 1, 3, 30, 30), "image_attention_mask": torch.ones(2, 8, 1)},
        12, "2 per decoder, per gated cross and per vision layer, 2 layers each",
        LLAMA | {"model_type": "idefics", "cross_layer_interval": 1, "use_resampler": False,
         "additional_vocab_size": 0, "alpha_initializer": "ones",
         "vision_config": {"embed_dim": 32, "image_size": 30, "patch_size": 15, "num_hidden_layers": 2,
             "num_attention_heads": 4, "intermediate_size": 64}}),
    Row("Idefics3ForConditionalGeneration", _with_image_tokens(98, 4, size=32, extra=1), 8, TOWERS,
        {"text_config": LLAMA, "vision_config": SIGHT | {"patch_size": 8}, "image_token_id": 98, "scale_factor": 2}),
    Row("Blip2ForConditionalGeneration", _with_image_tokens(98, 6), 13,
        "2 per vision and language layer; Q-Former 2 per layer + cross-attention in every second",
        {"vision_config": SIGHT, "image_token_index": 98, "image_token_id": 98, "num_query_tokens": 6,
         "qformer_config": TEXT | {"cross_attention_frequency": 2, "encoder_hidden_size": 32},
         "text_config": {"model_type": "opt", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32,
             "max_position_embeddings": 64}}),
    Row("Qwen2VLForConditionalGeneration", lambda: text()() | {
         "input_ids": torch.tensor([[5, 95, 98, 98, 98, 98, 6, 7]]), "pixel_values": torch.randn(16, 3 * 2 * 16),
         "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]])},
        8, TOWERS,
        {"text_config": {k: v for k, v in LLAMA.items() if k != "model_type"} | {
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
         "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2,
             "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
         "image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 95, "vision_end_token_id": 96}),
]  # fmt: skip
