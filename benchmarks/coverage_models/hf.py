"""Transformers: about 230 tiny configurations of its model classes, with random weights.

``weight`` says how much a family is used, by the author's knowledge of which checkpoints are downloaded most
(not measured): "high" for the architectures of the best-known ones, "middle" for those still in wide use.
"""

from __future__ import annotations

from .family import Family, Weight
from .hf_audio import AUDIO
from .hf_decoders import DECODERS
from .hf_encoders import ENCODERS
from .hf_multimodal import MULTIMODAL
from .hf_rows import Row
from .hf_seq2seq import SEQ2SEQ
from .hf_vision import VISION

ROWS: tuple[Row, ...] = (*ENCODERS, *DECODERS, *SEQ2SEQ, *VISION, *AUDIO, *MULTIMODAL)
HIGH = frozenset([
    "BertModel", "RobertaModel", "XLMRobertaModel", "DistilBertModel", "MPNetModel", "ElectraModel",
    "DebertaV2Model", "ModernBertModel", "AlbertModel", "GPT2LMHeadModel", "OPTForCausalLM", "LlamaForCausalLM",
    "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "Phi3ForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM",
    "T5ForConditionalGeneration", "BartForConditionalGeneration", "WhisperForConditionalGeneration",
    "MarianMTModel", "ViTForImageClassification", "Dinov2Model", "SegformerForSemanticSegmentation",
    "ResNetForImageClassification", "DetrForObjectDetection", "Wav2Vec2ForCTC", "HubertModel", "CLIPModel",
    "SiglipModel", "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "SamModel",
])  # fmt: skip
MIDDLE = frozenset([
    "CamembertModel", "ErnieModel", "DebertaModel", "XLNetModel", "LongformerModel", "BigBirdModel",
    "FNetModel", "EsmModel", "LayoutLMModel", "SqueezeBertModel", "MobileBertModel", "GPTNeoForCausalLM",
    "GPTNeoXForCausalLM", "GPTJForCausalLM", "BloomForCausalLM", "FalconForCausalLM", "MptForCausalLM",
    "MixtralForCausalLM", "GemmaForCausalLM", "PhiForCausalLM", "CohereForCausalLM", "Olmo2ForCausalLM",
    "StableLmForCausalLM", "Starcoder2ForCausalLM", "GraniteForCausalLM", "SmolLM3ForCausalLM",
    "Qwen3NextForCausalLM", "Llama4ForCausalLM", "Lfm2ForCausalLM", "MambaForCausalLM", "Mamba2ForCausalLM",
    "JambaForCausalLM", "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration",
    "MBartForConditionalGeneration", "PegasusForConditionalGeneration", "M2M100ForConditionalGeneration",
    "LEDForConditionalGeneration", "BlenderbotForConditionalGeneration", "Speech2TextForConditionalGeneration",
    "DeiTForImageClassification", "BeitForImageClassification", "SwinForImageClassification",
    "Swinv2ForImageClassification", "DINOv3ViTModel", "ConvNextForImageClassification",
    "ConvNextV2ForImageClassification", "ViTMAEForPreTraining", "YolosForObjectDetection",
    "DPTForDepthEstimation", "MobileViTForImageClassification", "EfficientNetForImageClassification",
    "DeformableDetrForObjectDetection", "TableTransformerForObjectDetection", "RTDetrForObjectDetection",
    "WavLMModel", "Wav2Vec2ConformerModel", "Wav2Vec2BertModel", "ASTForAudioClassification", "EncodecModel",
    "BlipModel", "ViltModel", "OwlViTModel", "LayoutLMv3Model", "GitForCausalLM",
    "Blip2ForConditionalGeneration", "PaliGemmaForConditionalGeneration", "Gemma3ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
])  # fmt: skip


def _weight(row: Row) -> Weight:
    if row.variant:
        return "low"
    return "high" if row.model in HIGH else "middle" if row.model in MIDDLE else "low"


FAMILIES: tuple[Family, ...] = tuple(
    Family("transformers", row.name, row.build, row.blocks, f"counted: {row.why}", weight=_weight(row),
           trains=row.trains, batch=row.batch)
    for row in ROWS
)  # fmt: skip
