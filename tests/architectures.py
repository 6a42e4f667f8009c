"""Tiny, randomly initialised models of many architectures: what a new release of transformers is tried on.

Every row says how many attentions the graph must hold. The numbers come from torch, not from our matching:
`count_attentions` counts the calls of attention modules.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import onnx_ir as ir
import torch
import transformers
from exports import by_transformers, export_module
from torch import nn

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 1}
DECODER = {
    **TEXT, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {
    **DECODER, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64, "max_position_embeddings": 64, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4, "vocab_size": 64,
    "use_cache": False, "decoder_start_token_id": 0,
}  # fmt: skip
VISION = {**SIZES, "image_size": 16, "patch_size": 4}
WINDOWS = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
PYRAMID = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
}  # fmt: skip
SPEECH = {
    **SIZES, "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 32,
}  # fmt: skip
SERIES = {
    "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 2, "input_size": 1,
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "use_cache": False,
}  # fmt: skip
PATCHES = {
    "num_input_channels": 3, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 32,
}  # fmt: skip
PERCEIVER = {
    "num_latents": 6, "d_latents": 32, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4, "num_cross_attention_heads": 4,
}  # fmt: skip
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage4"],
}  # fmt: skip
DETR = {
    **{key: value for key, value in SEQ2SEQ.items() if key.startswith(("d_model", "encoder", "decoder_"))},
    "use_timm_backbone": False, "backbone": None, "backbone_config": RESNET, "num_queries": 5,
}  # fmt: skip


def wave(*shape: int) -> torch.Tensor:
    """Numbers between -1 and 1 that differ everywhere."""
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


IDS = {"input_ids": torch.arange(2 * 12).reshape(2, 12) % 50 + 3}
PADDED = {**IDS, "attention_mask": torch.tensor([[1] * 12, [1] * 9 + [0] * 3])}
PAIR = {**PADDED, "decoder_input_ids": IDS["input_ids"] + 1}
BOXES = {"bbox": torch.tensor([[[1, 2, 3 + token % 5, 9] for token in range(12)]] * 2)}
IMAGE = {"pixel_values": wave(2, 3, 16, 16)}
IMAGE32 = {"pixel_values": wave(2, 3, 32, 32)}
IMAGE64 = {"pixel_values": wave(2, 3, 64, 64)}
VIDEO = {"pixel_values": wave(2, 4, 3, 16, 16)}
SOUND = {"input_values": wave(2, 600)}
SPECTRUM = {"input_features": wave(2, 8, 20)}
DECODED = {"inputs_embeds": wave(2, 4, 6), "encoder_hidden_states": wave(2, 8, 32)}
CHANNELS = {"past_values": wave(2, 16, 3)}


@dataclass(frozen=True)
class Architecture:
    """A model to export, and what its graph must hold."""

    model: str
    """Class, as seen from `transformers`."""

    config: Mapping[str, Any]
    inputs: Mapping[str, torch.Tensor]

    attentions: int
    """How often a forward pass calls an attention module; layers that share one count every time."""

    mapless: int = 0
    """How many of these have no map to patch: linear attention, autocorrelation; or constants as all their inputs."""

    refused: int = 0
    """How many have keys that stand token by token in no tensor, or in none that nothing else reads: windows on an
    axis, or keys that choose the queries as well."""

    softmaxes: int = 0
    """Softmaxes that are no attention: routers over experts, weights of delays."""

    @property
    def sites(self) -> int:
        """How many attentions can be patched."""
        return self.attentions - self.mapless - self.refused

    def build(self) -> nn.Module:
        """The model, with random weights, in the attention implementation that transformers prefers."""
        torch.manual_seed(0)
        model = attrgetter(self.model)(transformers)
        return model._from_config(model.config_class(**self.config)).eval()


ARCHITECTURES = {
    # text encoders
    "albert": Architecture("AlbertModel", {**TEXT, "embedding_size": 16}, PADDED, 2),
    "big_bird": Architecture("BigBirdModel", {**TEXT, "attention_type": "original_full"}, PADDED, 2),
    "deberta": Architecture(
        "DebertaModel", {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, PADDED, 2
    ),
    "deberta-v2": Architecture(
        "DebertaV2Model",
        {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
        PADDED, 2,
    ),
    "electra": Architecture("ElectraModel", {**TEXT, "embedding_size": 16}, PADDED, 2),
    "esm": Architecture(
        "EsmModel",
        {**TEXT, "position_embedding_type": "rotary", "mask_token_id": 32, "token_dropout": False},
        PADDED, 2,
    ),
    "funnel": Architecture(
        "FunnelModel",
        {"d_model": 32, "block_sizes": [1, 1], "n_head": 4, "d_head": 8, "d_inner": 32, "vocab_size": 64,
         "num_decoder_layers": 1},
        PADDED, 3,
    ),
    "layoutlm": Architecture(
        "LayoutLMModel", {**TEXT, "max_2d_position_embeddings": 32}, {**PADDED, **BOXES}, 2
    ),
    "layoutlmv3": Architecture(
        "LayoutLMv3Model",
        {**TEXT, "input_size": 16, "patch_size": 4, "coordinate_size": 4, "shape_size": 8,
         "max_2d_position_embeddings": 32},
        {**PADDED, **BOXES, **IMAGE}, 2,
    ),
    "mobilebert": Architecture(
        "MobileBertModel",
        {**TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        PADDED, 2,
    ),
    "roberta": Architecture("RobertaModel", TEXT, PADDED, 2),
    "squeezebert": Architecture(
        "SqueezeBertModel",
        {**TEXT, "embedding_size": 32, "q_groups": 1, "k_groups": 1, "v_groups": 1, "post_attention_groups": 1,
         "intermediate_groups": 1, "output_groups": 1},
        PADDED, 2,
    ),
    "xlm": Architecture(
        "XLMModel",
        {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 64, "max_position_embeddings": 64, "pad_index": 0},
        PADDED, 2,
    ),
    "xlnet": Architecture(
        "XLNetModel",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 32, "vocab_size": 64, "use_mems_eval": False},
        PADDED, 2,
    ),
    # decoders: grouped queries, sinks, softcap, alibi, one head of keys and values, a cache, experts, state spaces
    "bloom": Architecture(
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "use_cache": False},
        PADDED, 2,
    ),
    "falcon": Architecture(
        "FalconForCausalLM",
        {**TEXT, "multi_query": True, "new_decoder_architecture": False, "use_cache": False},
        PADDED, 2,
    ),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", {**DECODER, "sliding_window": 4, "attn_logit_softcapping": 5.0}, PADDED, 2
    ),
    "gpt_neo": Architecture(
        "GPTNeoForCausalLM",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
         "window_size": 4, "intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": 64,
         "use_cache": False},
        PADDED, 2,
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        {**EXPERTS, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
        PADDED, 2, softmaxes=2,
    ),
    "gptj": Architecture(
        "GPTJForCausalLM",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 64, "n_positions": 64,
         "use_cache": False},
        PADDED, 2,
    ),
    "jamba": Architecture(
        "JambaForCausalLM",
        {**DECODER, "num_experts": 1, "mamba_d_state": 8, "use_mamba_kernels": False, "attn_layer_period": 2,
         "attn_layer_offset": 1},
        PADDED, 1,
    ),
    "mixtral": Architecture("MixtralForCausalLM", EXPERTS, PADDED, 2, softmaxes=2),
    "qwen2_cache": Architecture("Qwen2ForCausalLM", {**DECODER, "use_cache": True}, PADDED, 2),
    "qwen3": Architecture("Qwen3ForCausalLM", DECODER, PADDED, 2),
    # encoders with decoders
    "m2m_100": Architecture("M2M100Model", SEQ2SEQ, PAIR, 3),
    "mbart": Architecture("MBartModel", SEQ2SEQ, PAIR, 3),
    "mt5": Architecture("MT5Model", T5, PAIR, 3),
    # images
    "beit": Architecture("BeitModel", {**VISION, "use_relative_position_bias": True}, IMAGE, 2),
    "clip_text": Architecture(
        "CLIPTextModel", {**TEXT, "bos_token_id": 0, "eos_token_id": 2}, PADDED, 2
    ),
    "clip_vision": Architecture("CLIPVisionModel", VISION, IMAGE, 2),
    "deit": Architecture("DeiTModel", VISION, IMAGE, 2),
    "detr": Architecture("DetrModel", DETR, IMAGE64, 3, mapless=1),
    "dinov2": Architecture("Dinov2Model", VISION, IMAGE, 2),
    "hiera": Architecture(
        "HieraModel",
        {"embed_dim": 16, "image_size": [32, 32], "patch_kernel": [7, 7], "patch_stride": [4, 4],
         "patch_padding": [3, 3], "depths": [1, 1], "num_heads": [2, 4], "num_query_pool": 1, "query_stride": [2, 2],
         "masked_unit_size": [4, 4], "masked_unit_attention": [True, False]},
        IMAGE32, 2,
    ),
    "mobilevit": Architecture(
        "MobileViTModel",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
         "num_attention_heads": 4, "mlp_ratio": 2.0},
        IMAGE64, 9,
    ),
    "perceiver": Architecture("PerceiverModel", PERCEIVER, {"inputs": wave(2, 10, 16)}, 3),
    "pvt_v2": Architecture("PvtV2ForImageClassification", {**PYRAMID, "image_size": 32}, IMAGE32, 2),
    "sam_vision": Architecture(
        "SamVisionModel",
        {**SIZES, "image_size": 32, "patch_size": 8, "mlp_dim": 32, "output_channels": 16, "window_size": 2,
         "global_attn_indexes": [1], "initializer_range": 0.1},
        IMAGE32, 2,
    ),
    "segformer": Architecture("SegformerModel", PYRAMID, IMAGE32, 2),
    "siglip_vision": Architecture("SiglipVisionModel", VISION, IMAGE, 3),
    "swin": Architecture("SwinModel", WINDOWS, IMAGE32, 3),
    "swinv2": Architecture("Swinv2Model", WINDOWS, IMAGE32, 3),
    "visual_bert": Architecture(
        "VisualBertModel",
        {**TEXT, "visual_embedding_dim": 16},
        {**PADDED, "visual_embeds": wave(2, 5, 16), "visual_attention_mask": torch.ones(2, 5)},
        2,
    ),
    # films
    "timesformer": Architecture("TimesformerModel", {**VISION, "num_frames": 4}, VIDEO, 4),
    "videomae": Architecture("VideoMAEModel", {**VISION, "num_frames": 4, "tubelet_size": 2}, VIDEO, 2),
    "vivit": Architecture("VivitModel", {**VISION, "num_frames": 4, "tubelet_size": [2, 4, 4]}, VIDEO, 2),
    # sound
    "audio-spectrogram-transformer": Architecture(
        "ASTModel",
        {**SIZES, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8},
        {"input_values": wave(2, 16, 8)}, 2,
    ),
    "wav2vec2": Architecture("Wav2Vec2Model", SPEECH, SOUND, 2),
    "wav2vec2-bert": Architecture(
        "Wav2Vec2BertModel",
        {**SIZES, "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3},
        {"input_features": wave(2, 10, 16)}, 2,
    ),
    "wavlm": Architecture("WavLMModel", {**SPEECH, "num_buckets": 16, "max_bucket_distance": 20}, SOUND, 2),
    "whisper": Architecture(
        "WhisperModel",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32},
        {**SPECTRUM, "decoder_input_ids": IDS["input_ids"]}, 3,
    ),
    # time series
    "autoformer_encoder": Architecture(
        "models.autoformer.modeling_autoformer.AutoformerEncoder", SERIES, {"inputs_embeds": wave(2, 8, 6)}, 1, 1,
        softmaxes=1,
    ),
    "informer_decoder": Architecture(
        "models.informer.modeling_informer.InformerDecoder", SERIES, DECODED, 2, refused=1
    ),
    "patchtst": Architecture("PatchTSTModel", PATCHES, CHANNELS, 2),
    "time_series_transformer_decoder": Architecture(
        "models.time_series_transformer.modeling_time_series_transformer.TimeSeriesTransformerDecoder",
        SERIES, DECODED, 2,
    ),
    # no map of attention anywhere
    "fnet": Architecture("FNetModel", TEXT, IDS, 0),
    "mamba": Architecture(
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 64, "use_cache": False},
        IDS, 0,
    ),
    "rwkv": Architecture(
        "RwkvModel",
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 32,
         "vocab_size": 64, "context_length": 32, "use_cache": False},
        IDS, 2, 2,
    ),
    "yoso": Architecture("YosoModel", TEXT, PADDED, 2, 2),
    "poolformer": Architecture(
        "PoolFormerModel", {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}, IMAGE32, 0
    ),
}  # fmt: skip

SOMETIMES = {
    "big_bird", "electra", "esm", "layoutlm", "layoutlmv3", "mobilebert", "roberta", "xlm", "gpt_neo", "gptj", "qwen3",
    "m2m_100", "clip_text", "deit", "segformer", "visual_bert", "vivit", "videomae", "wav2vec2",
    "autoformer_encoder", "funnel", "mobilevit", "poolformer", "rwkv",
}  # fmt: skip
"""Each resembles one of the others, which are enough for every day."""


def count_attentions(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> int:
    """How often a forward pass calls a module whose class is an attention, of nested ones the innermost."""
    calls: list[str] = []
    for name, module in model.named_modules():
        inner = (part for path, part in module.named_modules() if path)
        if _is_attention(module) and not any(map(_is_attention, inner)):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        model(**inputs)
    return len(calls)


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


@functools.cache
def export_architecture(name: str) -> ir.Model:
    """The architecture as transformers' own exporter writes it by default."""
    architecture = ARCHITECTURES[name]
    return export_module(architecture.build(), dict(architecture.inputs), by_transformers)
