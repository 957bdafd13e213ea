"""A fixed spread of 40 families: each kind of block once, and models without any; those that are used most first."""

QUICK = {
    "timm": (
        "convnext_tiny", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mobilenetv3_small_050",
        "cait_xxs24_224", "edgenext_xx_small", "samvit_base_patch16", "resnetv2_50x1_bit", "resnest14d",
        "rexnet_100", "dpn48b", "vit_mid", "starnet_s050", "densenet121",
    ),
    "torchvision": ("resnet18", "swin", "mobilenet_v2", "mvit_v2", "squeezenet1_1"),
    "torch": ("Transformer", "TransformerEncoder, padded"),
    "handwritten": (
        "f += x", "highway", "parallel", "dict output", "raw weights", "one layer, three calls", "side output",
        "RepVGG", "positions, mask, rotation",
    ),
    "transformers": (
        "BertModel", "AlbertModel", "GPT2LMHeadModel", "LlamaForCausalLM", "MixtralForCausalLM", "Gemma3ForCausalLM",
        "MambaForCausalLM", "BartForConditionalGeneration", "ViTForImageClassification", "CLIPModel",
    ),
}  # fmt: skip
"""Source -> names of families."""
