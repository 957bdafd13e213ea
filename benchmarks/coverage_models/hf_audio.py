"""Audio models of transformers: tiny configurations and their published number of residual blocks."""

from __future__ import annotations

from typing import Any

import torch

from .hf_rows import Row, tensor, wave

TWO = "2 per layer: attention, MLP"
CONFORMER = "4 per conformer layer: half MLP, attention, convolution, half MLP (Gulati 2020)"
WAV: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0,
    "codevector_dim": 8, "proj_codevector_dim": 8, "num_codevectors_per_group": 4, "classifier_proj_size": 16,
    "tdnn_dim": (16,), "tdnn_kernel": (1,), "tdnn_dilation": (1,), "output_hidden_size": 32,
    "apply_spec_augment": False,  # it draws from NumPy's global generator in train mode
}  # fmt: skip
POSITION = "; 1 for the convolutional position embedding (x + conv(x))"


def _wav(model: str, why: str = TWO + POSITION, blocks: int = 5, variant: str = "", **more: Any) -> Row:
    return Row(model, wave(), blocks, why, {**WAV, **more}, variant)


AUDIO: list[Row] = [
    _wav("Wav2Vec2ForCTC"),
    _wav("Wav2Vec2Model", variant="stable", do_stable_layer_norm=True, feat_extract_norm="layer"),
    _wav("HubertModel"),
    _wav("WavLMModel", num_buckets=8, max_bucket_distance=16),
    _wav("UniSpeechModel"),
    _wav("UniSpeechSatModel"),
    _wav("SEWModel", TWO + "; the squeezed positional sum", squeeze_factor=2),
    _wav("SEWDModel", TWO + "; the squeezed positional sum", squeeze_factor=2, position_buckets=8),
    _wav("Data2VecAudioModel", conv_pos_kernel_size=3),
    _wav("Wav2Vec2ConformerModel", CONFORMER, 8),
    Row("Wav2Vec2BertModel", tensor("input_features", 2, 12, 8), 8, CONFORMER,
        WAV | {"feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 5}),
    Row("ParakeetEncoder", tensor("input_features", 2, 32, 16), 8, CONFORMER,
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "num_key_value_heads": 4, "subsampling_conv_channels": 8, "num_mel_bins": 16, "conv_kernel_size": 5,
         "scale_input": False}),
    Row("ASTForAudioClassification", tensor("input_values", 2, 32, 16), 4, TWO,
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16}),
    Row("EncodecModel", tensor("input_values", 1, 1, 320), 10,
        "encoder and decoder: 1 residual unit per ratio (4) + 1 around the LSTM, each; the quantiser's sums are none",
        {"hidden_size": 16, "num_filters": 4, "codebook_size": 16, "codebook_dim": 16}),
    Row("DacModel", tensor("input_values", 1, 1, 320), 12, "3 residual units per ratio, 2 ratios, encoder and decoder",
        {"encoder_hidden_size": 8, "decoder_hidden_size": 16, "downsampling_ratios": [2, 4],
         "upsampling_ratios": [4, 2], "n_codebooks": 2, "codebook_size": 16, "codebook_dim": 4, "hidden_size": 32}),
    Row("MimiModel", tensor("input_values", 1, 1, 1920), 16,
        "encoder and decoder: 1 unit per ratio (4), 2 per transformer layer (2 layers)",
        {"hidden_size": 32, "num_filters": 4, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4, "intermediate_size": 64, "codebook_size": 16, "codebook_dim": 16, "head_dim": 8,
         "vector_quantization_hidden_dimension": 16, "upsample_groups": 32, "num_quantizers": 2}),
    Row("SpeechT5HifiGan", tensor("spectrogram", 2, 12, 8), 4,
        "1 per dilation (2), kernel (1) and rate (2) (Kong 2020)",
        {"model_in_dim": 8, "upsample_initial_channel": 16, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4],
         "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]}),
    Row("MoonshineForConditionalGeneration", lambda: wave(4000)() | {"decoder_input_ids": torch.randint(5, 90, (2, 6))},
        10, "2 per encoder + 3 per decoder layer",
        {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "encoder_num_hidden_layers": 2,
         "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4}),
]  # fmt: skip
