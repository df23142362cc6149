"""Why models that no adapter knows are refused, as far as their config tells."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

_LATENT = "its attention is latent (MLA): the cache holds one latent a token instead of keys and values"
_INDEXED = "an indexer keeps keys of its own beside the cache, and they would point at tokens that are gone"
_CROSS = "its images are read by cross-attention, so the cache of its language model holds no vision tokens"
_QUERIES = "its images are a few dozen learnt queries each, so there is next to nothing to compress"
_PREFIX = "all its image tokens see each other, across images, and BlindSight's masks know no such rule"
_STATES = "its layers hold states, or keys and values, in a way that caches of capsules do not know"
_SHARED = "its last layers reuse the keys and values of earlier ones"
_CODES = "its images are codes of its vocabulary, or patches without a vision tower"
_NO_ANSWER = "it writes no answers about pictures: it classifies, denoises or acts"
_AXES = "its tokens have positions on four axes"
_REASONS = {
    **dict.fromkeys(("nemotron_h_omni", "inkling_mm_model", "inkling2", "unlimited_ocr"), _STATES),
    **dict.fromkeys(("kimi_k25", "mistral_large4", "deepseek_vl_v2", "kimi_vl"), _LATENT),
    **dict.fromkeys(("qwen4_exp", "glm5_next", "minimax_m3_vl", "dots3_note"), _INDEXED),
    **dict.fromkeys(("mllama", "idefics", "florence2", "blip", "evolla"), _CROSS),
    **dict.fromkeys(("pix2struct", "pp_formulanet", "udop", "t5gemma2", "vision-encoder-decoder"), _CROSS),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo", "kosmos-2", "git"), _QUERIES),
    **dict.fromkeys(("paligemma", "molmo2"), _PREFIX),
    **dict.fromkeys(("chameleon", "emu3", "fuyu"), _CODES),
    **dict.fromkeys(("shieldgemma2", "diffusion_gemma", "cosmos3_omni", "cosmos3_edge", "pi0"), _NO_ANSWER),
    "gemma3n": _SHARED,
    "hunyuan_vl": _AXES,
}


def reason(config: Any) -> str:
    """Why a model of a type without an adapter is refused, as the start of a sentence."""
    model_type = getattr(config, "model_type", None)
    why = _REASONS.get(str(model_type)) or _seen_in(config)
    if why is not None:
        return f"model type {model_type!r} is not supported: {why}"
    known = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if getattr(config, "vision_config", None) is None and not known:
        return (
            f"model type {model_type!r} is no vision-language model; pass the config of the whole model "
            "(model.config), not that of its text model"
        )
    return f"no layout adapter for model type {model_type!r}"


def _seen_in(config: Any) -> str | None:
    """What the config itself says of a model whose type nobody has listed."""
    if getattr(config, "vision_config", None) is None:
        return None
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "cross_attention_layers", None):
        return _CROSS
    if "indexed_attention" in kinds:
        return _INDEXED
    if getattr(text, "kv_lora_rank", None):
        return _LATENT
    if getattr(text, "num_kv_shared_layers", 0):
        return _SHARED
    return _STATES if kinds & {"hybrid", "hybrid_sliding", "reference_sliding_attention"} else None
