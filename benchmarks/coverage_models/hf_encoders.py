"""Text encoders of transformers: tiny configurations and their published number of residual blocks."""

from __future__ import annotations

from typing import Any

import torch

from .hf_rows import Row, both, tensor, text

TWO = "2 per layer: attention, MLP"
BERT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip


def _bert(model: str, why: str = TWO, blocks: int = 4, length: int = 8, variant: str = "", **more: Any) -> Row:
    return Row(model, text(length), blocks, why, {**BERT, **more}, variant)


ENCODERS: list[Row] = [
    _bert("BertModel", "2 per layer (Devlin 2018, as in Vaswani 2017): BertSelfOutput, BertOutput"),
    _bert("BertLMHeadModel", "2 per layer, with a cache", variant="decoder", is_decoder=True),
    _bert("RobertaModel"),
    _bert("XLMRobertaModel"),
    _bert("XLMRobertaXLModel", "2 per layer, norms before (XLMRobertaXLAttention, …Output)"),
    _bert("RobertaPreLayerNormModel"),
    _bert("CamembertModel"),
    _bert("ElectraModel", embedding_size=16),
    _bert("ErnieModel"),
    _bert("MegatronBertModel", "2 per layer, norms before"),
    _bert("AlbertModel", "2 per call of the one shared layer, which runs 3 times", 6, num_hidden_layers=3,
          embedding_size=16),
    Row("DistilBertModel", text(), 4, "2 per TransformerBlock: attention, FFN",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}),
    _bert("DebertaModel", relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=2),
    _bert("DebertaV2Model", relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=2,
          norm_rel_ebd="layer_norm", position_buckets=8),
    _bert("DebertaV2Model", "2 per layer; the convolution beside layer 0 has no shortcut (both terms are computed)", 4,
          variant="conv",
          relative_attention=True, pos_att_type=["c2p", "p2c"], conv_kernel_size=3, conv_act="gelu"),
    _bert("MPNetModel"),
    Row("XLNetModel", text(), 4, "2 per layer: XLNetRelativeAttention, XLNetFeedForward",
        {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "d_head": 8}),
    Row("FunnelBaseModel", text(8), 8, "2 per layer, 4 layers; a block's first shortcut is the pooled query",
        {"vocab_size": 99, "d_model": 32, "block_sizes": [2, 2], "num_decoder_layers": 1, "n_head": 4, "d_head": 8,
         "d_inner": 64}),
    Row("FunnelModel", text(8), 10, "2 per layer, 4 encoder + 1 decoder layers; the long upsampled sum is none",
        {"vocab_size": 99, "d_model": 32, "block_sizes": [2, 2], "num_decoder_layers": 1, "n_head": 4, "d_head": 8,
         "d_inner": 64}),
    _bert("LongformerModel", attention_window=4),
    _bert("BigBirdModel", attention_type="original_full"),
    _bert("BigBirdModel", "2 per layer, sparse attention", length=64, variant="sparse", block_size=4,
          num_random_blocks=1),
    _bert("ModernBertModel", "2 per layer; the first layer has no attention norm", pad_token_id=0, bos_token_id=1,
          eos_token_id=2, cls_token_id=1, sep_token_id=2),
    _bert("NystromformerModel", num_landmarks=2, segment_means_seq_len=8, conv_kernel_size=3),
    _bert("YosoModel"),
    Row("FNetModel", text(), 4, "2 per layer: Fourier mixing (no weights; Lee-Thorp 2021, figure 1), FFN",
        {k: v for k, v in BERT.items() if k != "num_attention_heads"}),
    _bert("RoFormerModel", embedding_size=32),
    _bert("ConvBertModel", embedding_size=16, conv_kernel_size=3),
    _bert("MobileBertModel", "1 per layer: the bottleneck's outer shortcut; inside it attention and 4 FFN (Sun 2020)",
          2, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
    _bert("MobileBertModel", "per layer attention + num_feedforward_networks FFN; without bottleneck none is nested",
          2 * 5, variant="flat", embedding_size=16, use_bottleneck=False, true_hidden_size=32),
    _bert("SqueezeBertModel", "2 per layer (grouped convolutions)", embedding_size=32),
    _bert("EsmModel", "2 per layer, norms before", pad_token_id=1, mask_token_id=4, token_dropout=False),
    _bert("LayoutLMModel"),
    Row("LiltModel", both(text(), lambda: {"bbox": torch.randint(0, 30, (2, 8, 4)).sort(-1).values}), 6,
        "4 per layer: attention and MLP of text and of layout; nobody returns the last layer's layout",
        BERT | {"channel_shrink_ratio": 2, "hidden_size": 48, "max_2d_position_embeddings": 64}),
    _bert("RemBertModel", input_embedding_size=16, output_embedding_size=16),
    _bert("SplinterModel"),
    _bert("IBertModel"),
    _bert("MraModel", length=64, max_position_embeddings=70, block_per_row=1),
    _bert("XmodModel", "3 per layer: attention, MLP, language adapter", 6, languages=["en_XX"],
          default_language="en_XX"),
    _bert("NomicBertModel"),
    Row("CanineModel", text(16), 8, "2 per layer: 1 local, 2 deep, 1 final layer",
        {k: v for k, v in BERT.items() if k != "vocab_size"}
        | {"local_transformer_stride": 8, "num_hash_functions": 2, "num_hash_buckets": 50}),
    Row("XLMModel", text(), 4, TWO, {"vocab_size": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_langs": 1,
                                    "max_position_embeddings": 64}),
    Row("FlaubertModel", text(), 4, TWO, {"vocab_size": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 4,
                                         "max_position_embeddings": 64}),
    Row("ReformerModel", both(text(16), lambda: {"use_cache": False}), 4,
        "2 per layer: reversible attention and FFN (Kitaev 2020)",
        {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 8,
         "feed_forward_size": 64, "attn_layers": ["local", "local"], "local_attn_chunk_length": 4,
         "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16], "max_position_embeddings": 16},
        trains="its own backward pass calls backward() on every branch, also on one that is not computed"),
    Row("PerceiverModel", tensor("inputs", 2, 8, 32), 6, "2 for the cross-attention + 2 per self-attention, 2 of these",
        {"vocab_size": 99, "d_model": 32, "d_latents": 32, "num_latents": 6, "num_self_attends_per_block": 2,
         "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "max_position_embeddings": 64}),
]  # fmt: skip
