"""Encoder-decoders of transformers: tiny configurations and their published number of residual blocks."""

from __future__ import annotations

from typing import Any

from .hf_rows import Row, answer, both, tensor, text_to_text

FIVE = "2 per encoder + 3 per decoder layer (self-attention, cross-attention, MLP; Vaswani 2017)"
BART: dict[str, Any] = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
           "forced_eos_token_id": 2}  # fmt: skip
T5: dict[str, Any] = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def _bart(model: str, why: str = FIVE, blocks: int = 10, variant: str = "", length: int = 8, **more: Any) -> Row:
    return Row(model, text_to_text(length), blocks, why, {**BART, **SPECIAL, **more}, variant)


def _t5(model: str, why: str = FIVE, blocks: int = 10, variant: str = "", length: int = 8, **more: Any) -> Row:
    return Row(model, text_to_text(length), blocks, why, {**T5, **more}, variant)


SEQ2SEQ: list[Row] = [
    _t5("T5ForConditionalGeneration", FIVE + "; the first attentions also make the bias of all"),
    _t5("T5ForConditionalGeneration", variant="gated", feed_forward_proj="gated-gelu"),
    _t5("MT5ForConditionalGeneration"),
    _t5("UMT5ForConditionalGeneration"),
    _t5("LongT5ForConditionalGeneration", length=16, local_radius=3),
    _t5("LongT5ForConditionalGeneration", variant="global", length=16, local_radius=3, global_block_size=4,
        encoder_attention_type="transient-global"),
    _t5("SwitchTransformersForConditionalGeneration", FIVE + "; every second MLP is experts", num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, expert_capacity=16),
    _bart("BartForConditionalGeneration"),
    _bart("MBartForConditionalGeneration", "2 per encoder + 3 per decoder layer, norms before"),
    _bart("PegasusForConditionalGeneration"),
    _bart("PegasusXForConditionalGeneration", "2 per encoder layer for tokens, 2 for global tokens (nobody reads the "
          "last layer's), 3 per decoder layer (Phang 2022)", 12, length=16, num_global_tokens=2, block_size=8),
    _bart("BigBirdPegasusForConditionalGeneration", attention_type="original_full"),
    _bart("MarianMTModel"),
    _bart("BlenderbotForConditionalGeneration"),
    _bart("BlenderbotSmallForConditionalGeneration"),
    _bart("M2M100ForConditionalGeneration"),
    _bart("NllbMoeForConditionalGeneration", num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2),
    _bart("MvpForConditionalGeneration"),
    _bart("PLBartForConditionalGeneration"),
    _bart("FSMTForConditionalGeneration", src_vocab_size=99, tgt_vocab_size=99, langs=["en", "de"]),
    _bart("LEDForConditionalGeneration", max_encoder_position_embeddings=64, max_decoder_position_embeddings=64,
          attention_window=4),
    Row("ProphetNetForConditionalGeneration", text_to_text(), 10, FIVE,
        {"vocab_size": 99, "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2, "encoder_ffn_dim": 64,
         "decoder_ffn_dim": 64, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
         "max_position_embeddings": 64, "num_buckets": 8, "relative_max_distance": 16, "decoder_start_token_id": 2}),
    Row("WhisperForConditionalGeneration", both(tensor("input_features", 2, 8, 32), answer()), 10, FIVE,
        BART | SPECIAL | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32,
                          "suppress_tokens": None, "begin_suppress_tokens": None}),
    Row("Speech2TextForConditionalGeneration", both(tensor("input_features", 2, 32, 8), answer()), 10, FIVE,
        BART | SPECIAL | {"max_source_positions": 64, "max_target_positions": 64, "input_feat_per_channel": 8,
                          "conv_channels": 16, "num_conv_layers": 2, "conv_kernel_sizes": (3, 3)}),
    Row("T5GemmaForConditionalGeneration", text_to_text(), 10, FIVE,
        {"vocab_size": 99, **{part: {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8,
                                    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
                                    "sliding_window": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
                             for part in ("encoder", "decoder")}}),
]  # fmt: skip
