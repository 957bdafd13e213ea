"""Vision models of transformers: tiny configurations and their published number of residual blocks."""

from __future__ import annotations

from typing import Any

import torch

from .hf_rows import Row, image

TWO = "2 per layer: attention, MLP"
VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "num_channels": 3,
}  # fmt: skip
STAGES: dict[str, Any] = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 2, 1, 1]}
SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "out_features": None, "out_indices": None,
}  # fmt: skip
DETR: dict[str, Any] = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32, "num_queries": 5,
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
}  # fmt: skip
BACKBONE: dict[str, Any] = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage4"],
}  # fmt: skip
PYRAMID: dict[str, Any] = BACKBONE | {"out_features": ["stage2", "stage3", "stage4"]}
RESNET_PART = "4 in the ResNet backbone"


def _vit(model: str, blocks: int = 4, why: str = TWO, variant: str = "", **more: Any) -> Row:
    return Row(model, image(), blocks, why, {**VIT, **more}, variant)


def _row(model: str, blocks: int, why: str, size: int = 64, variant: str = "", **options: Any) -> Row:
    return Row(model, image(size), blocks, why, options, variant)


VISION: list[Row] = [
    _vit("ViTForImageClassification", why="2 per layer (Dosovitskiy 2020)"),
    _vit("DeiTForImageClassification"),
    _vit("BeitForImageClassification", why=TWO + ", each with a layer scale", use_relative_position_bias=True),
    _vit("Data2VecVisionModel", why=TWO + ", each with a layer scale"),
    _vit("Dinov2Model", why=TWO + ", each with a layer scale"),
    _vit("Dinov2Model", why=TWO, variant="swiglu", use_swiglu_ffn=True),
    _vit("Dinov2WithRegistersModel"),
    _vit("DINOv3ViTModel", num_register_tokens=2),
    _vit("IJepaModel"),
    _vit("ViTMSNModel"),
    _vit("ViTMAEForPreTraining", 8, "2 per encoder and decoder layer, 2 of each", decoder_hidden_size=32,
         decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=64),
    _vit("VitDetModel", 6, "2 per layer + 1 per convolutional residual block after a layer",
         pretrain_image_size=32, window_block_indices=[0], residual_block_indices=[0, 1], window_size=2),
    _vit("YolosForObjectDetection", image_size=(32, 32), num_detection_tokens=5),
    _row("SwinForImageClassification", 8, "2 per layer: (shifted) window attention, MLP", 32, **SWIN),
    _row("Swinv2ForImageClassification", 8, "2 per layer, norms after the branches", 32, **SWIN),
    _row("Swin2SRModel", 2, "1 per stage (RSTB; Conde 2022): inside it 2 per layer; the one around all is long", 16,
         **{k: v for k, v in SWIN.items() if k not in ("patch_size",)}, patch_size=1, upscale=2),
    _row("DonutSwinModel", 8, "2 per layer", 32, **SWIN),
    _row("ConvNextForImageClassification", 5, "1 per layer (Liu 2022)", **STAGES),
    _row("ConvNextV2ForImageClassification", 5, "1 per layer; GRN's own sum lies inside", **STAGES),
    _row("DINOv3ConvNextModel", 5, "1 per layer", **STAGES),
    _row("SegformerForSemanticSegmentation", 10, "2 per layer, 5 layers (Xie 2021)", 64, **STAGES,
         num_attention_heads=[1, 2, 2, 4], sr_ratios=[4, 2, 1, 1], decoder_hidden_size=16),
    _row("PvtForImageClassification", 10, "2 per layer, 5 layers", 64, **STAGES, image_size=64,
         num_attention_heads=[1, 2, 2, 4], sequence_reduction_ratios=[4, 2, 1, 1], mlp_ratios=[2, 2, 2, 2]),
    _row("PvtV2ForImageClassification", 10, "2 per layer, 5 layers", 64, **STAGES, image_size=64,
         num_attention_heads=[1, 2, 2, 4], sr_ratios=[4, 2, 1, 1], mlp_ratios=[2, 2, 2, 2]),
    _row("PoolFormerForImageClassification", 10, "2 per layer: pooling with its norm, MLP (Yu 2022)", **STAGES),
    _row("LevitForImageClassification", 10, "2 per layer, 1 + 2 + 1 layers; the MLP after each of 2 shrinking "
         "attentions (Graham 2021)", image_size=64, patch_size=16,
         hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 2, 1], key_dim=[8, 8, 8]),
    _row("CvtForImageClassification", 12, "2 per layer, 1 + 2 + 3 layers", embed_dim=[8, 16, 32], num_heads=[1, 2, 4],
         depth=[1, 2, 3]),
    _row("MobileViTForImageClassification", 20, "2 inverted residuals of stride 1 (stage 2), 2 per transformer layer, "
         "2 + 4 + 3 layers (Mehta 2021, table 4)",
         hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 16, 16, 16, 16, 16, 32], num_attention_heads=2,
         image_size=64),
    _row("MobileViTV2ForImageClassification", 20, "inverted residuals of stride 1 and equal width (2 at this width), "
         "2 per attention layer, 2 + 4 + 3 layers", image_size=64,
         base_attn_unit_dims=[16, 16, 16], width_multiplier=0.125),
    _row("RegNetForImageClassification", 5, "1 per layer (RegNetY)", **STAGES, embedding_size=8, groups_width=8),
    _row("ResNetForImageClassification", 5, "1 per layer: bottlenecks (He 2015)", **STAGES, embedding_size=8),
    _row("ResNetForImageClassification", 5, "1 per layer: basic blocks", variant="basic", **STAGES,
         embedding_size=8, layer_type="basic"),
    _row("BitForImageClassification", 5, "1 per layer, pre-activation (Kolesnikov 2019)", **STAGES, embedding_size=8,
         num_groups=2),
    _row("BitForImageClassification", 5, "1 per layer, bottleneck", variant="bottleneck", **STAGES, embedding_size=8,
         num_groups=2, layer_type="bottleneck"),
    _row("EfficientNetForImageClassification", 9, "B0: repeats 1,2,2,3,3,4,1 minus 7 stage starts (Tan 2019)",
         width_coefficient=0.25, depth_coefficient=1.0, image_size=64, hidden_dim=320, dropout_rate=0.1),
    _row("MobileNetV2ForImageClassification", 10, "inverted residuals of stride 1 with equal widths (Sandler 2018)",
         image_size=64, depth_multiplier=0.35),
    _row("FocalNetForImageClassification", 10, "2 per layer, 5 layers: focal modulation, MLP", image_size=64,
         embed_dim=16, hidden_sizes=[16, 32, 32, 32], depths=[1, 2, 1, 1], use_layerscale=True),
    _row("HieraForImageClassification", 8, "2 per layer; projection where a stage begins", image_size=[64, 64],
         embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], patch_size=[7, 7], patch_stride=[4, 4],
         masked_unit_size=[8, 8]),
    _row("SwiftFormerForImageClassification", 15, "1 per ConvEncoder; 3 per last block of a stage "
         "(local representation, attention, MLP), 4 stages of 2, 1, 2, 2 (Shaker 2023)",
         image_size=64, depths=[2, 1, 2, 2],
         embed_dims=[8, 16, 16, 16]),
    _row("DPTForDepthEstimation", 15, "2 per ViT layer, 4 layers; 2 residual units per fusion layer, but 1 in the "
         "first (Ranftl 2021); the fusion's own sum is long", 32,
         **(VIT | {"num_hidden_layers": 4}), backbone_out_indices=[0, 1, 2, 3],
         neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, is_hybrid=False, reassemble_factors=[4, 2, 1, 0.5]),
    _row("GLPNForDepthEstimation", 10, "2 per layer, 5 layers", **STAGES, num_attention_heads=[1, 2, 2, 4],
         sr_ratios=[4, 2, 1, 1], decoder_hidden_size=16),
    _row("DetrForObjectDetection", 14, f"{RESNET_PART}, 2 per encoder + 3 per decoder layer", **DETR,
         backbone_config=BACKBONE),
    _row("ConditionalDetrForObjectDetection", 14, f"{RESNET_PART}, 2 per encoder + 3 per decoder layer", **DETR,
         backbone_config=BACKBONE),
    _row("TableTransformerForObjectDetection", 14, f"{RESNET_PART}, 2 per encoder + 3 per decoder layer", **DETR,
         backbone_config=BACKBONE),
    _row("DeformableDetrForObjectDetection", 14, f"{RESNET_PART}, 2 per encoder + 3 per decoder layer", **DETR,
         backbone_config=PYRAMID),
    _row("DabDetrForObjectDetection", 14, f"{RESNET_PART}, 2 per encoder + 3 per decoder layer",
         **{("hidden_size" if k == "d_model" else k): v for k, v in DETR.items()}, backbone_config=BACKBONE),
    _row("RTDetrForObjectDetection", 12, f"{RESNET_PART}, 2 per encoder + 3 per decoder layer; the CSP and RepVGG "
         "sums are parallel", d_model=32, encoder_hidden_dim=32, encoder_layers=1,
         decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
         decoder_ffn_dim=64, num_queries=5, encoder_in_channels=[16, 24, 32], decoder_in_channels=[32, 32, 32],
         num_denoising=0, hidden_expansion=0.5,
         backbone_config=PYRAMID | {"model_type": "rt_detr_resnet"}),
    Row("SamModel", lambda: {"pixel_values": torch.randn(1, 3, 32, 32), "input_points": torch.rand(1, 1, 2, 2) * 32},
        12, "2 per vision layer; 4 per two-way layer of the mask decoder, 3 in its first (Kirillov 2023) + 1 last",
        {"vision_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
                           "patch_size": 8, "output_channels": 16, "mlp_dim": 64, "window_size": 2,
                           "global_attn_indexes": [1], "num_pos_feats": 8},
         "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
         "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 4,
                                 "iou_head_hidden_dim": 16}}),
]  # fmt: skip
