"""config.json of the Qwen2.5-Omni thinker against SaberConfig, both ways."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from saber_jax.models.config import (
    AudioConfig,
    SaberConfig,
    TextConfig,
    TokenIds,
    VisionConfig,
    saber_config,
)

ARCHITECTURE = "Qwen2_5OmniThinkerForConditionalGeneration"

# Our field -> their key. What a config of theirs must say, because no default is safe: the vision
# width of transformers' own defaults is not the released one.
TEXT = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp_dim": "intermediate_size",
    "vocab": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}
VISION = {
    "depth": "depth",
    "width": "hidden_size",
    "heads": "num_heads",
    "mlp_dim": "intermediate_size",
    "out_width": "out_hidden_size",
    "full_attention_layers": "fullatt_block_indexes",
    "patch": "patch_size",
    "temporal_patch": "temporal_patch_size",
    "merge": "spatial_merge_size",
    "window": "window_size",
}
AUDIO = {
    "layers": "encoder_layers",
    "width": "d_model",
    "heads": "encoder_attention_heads",
    "mlp_dim": "encoder_ffn_dim",
    "out_width": "output_dim",
    "mel_bins": "num_mel_bins",
    "n_window": "n_window",
    "max_source_positions": "max_source_positions",
}
TOKENS = {
    "pad": "pad_token_id",
    "im_start": "bos_token_id",
    "eos": "eos_token_id",
    "audio": "audio_token_index",
    "audio_bos": "audio_start_token_id",
    "audio_eos": "audio_end_token_id",
    "vision_bos": "vision_start_token_id",
    "vision_eos": "vision_end_token_id",
    "image": "image_token_index",
    "video": "video_token_index",
}

# Settings that change the arithmetic and have one value in every released model.
FIXED = {
    "text_config": {"hidden_act": "silu", "use_sliding_window": False},
    "vision_config": {"hidden_act": "silu", "in_channels": 3},
    "audio_config": {"activation_function": "gelu", "scale_embedding": False},
}


def thinker(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The thinker's part of a config.json, whether it stands alone or inside the omni model's."""
    return config.get("thinker_config", config)


def from_hf(config: Mapping[str, Any]) -> SaberConfig:
    """The model that a config.json describes.

    Raises one ValueError that lists every missing key and every setting we do not implement.
    """
    config = thinker(config)
    sections = {name: config.get(name) or {} for name in FIXED}
    tables = {"text_config": TEXT, "vision_config": VISION, "audio_config": AUDIO}
    problems = [
        f"{section}.{key} is missing"
        for section, table in tables.items()
        for key in table.values()
        if key not in sections[section]
    ]
    for section, settings in FIXED.items():
        for key, value in settings.items():
            if sections[section].get(key, value) != value:
                got = sections[section][key]
                problems.append(f"{section}.{key} must be {value!r}, got {got!r}")
    rope, rope_problems = _rope(sections["text_config"])
    tokens = _tokens(config)
    vocab = sections["text_config"].get("vocab_size", math.inf)
    problems += rope_problems
    problems += [
        f"{TOKENS[name]} {value} is outside the vocabulary of {vocab}"
        for name, value in dataclasses.asdict(tokens).items()
        if not 0 <= value < vocab
    ]
    if problems:
        raise ValueError("config.json is not one of a Qwen2.5-Omni thinker: " + "; ".join(problems))
    text = sections["text_config"]
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    picked = {name: _pick(sections[name], table) for name, table in tables.items()}
    vision = picked["vision_config"]
    vision["full_attention_layers"] = tuple(vision["full_attention_layers"])
    return SaberConfig(
        text=TextConfig(head_dim=head_dim, **rope, **picked["text_config"]),
        vision=VisionConfig(**vision),
        audio=AudioConfig(**picked["audio_config"]),
        tokens=tokens,
        positions_per_second=config.get("position_id_per_seconds", 25),
        seconds_per_chunk=config.get("seconds_per_chunk", 2),
    )


def _pick(section: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    return {ours: section[theirs] for ours, theirs in table.items()}


def _rope(text: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Rotary settings, which transformers 5 writes in another place than 4 does."""
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", text.get("rope_theta"))
    sections = scaling.get("mrope_section")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    problems = []
    if theta is None:
        problems.append("text_config.rope_theta is missing")
    if sections is None or len(sections) != 3:
        problems.append(f"text_config.rope_scaling.mrope_section must be 3 sizes, got {sections}")
    if kind not in ("default", "mrope"):
        problems.append(f"text_config.rope_scaling.rope_type must be 'default', got {kind!r}")
    if problems or theta is None or sections is None:
        return {}, problems
    return {"rope_theta": float(theta), "mrope_section": tuple(sections)}, []


def _tokens(config: Mapping[str, Any]) -> TokenIds:
    # Configs omit ids that equal the release's, and every release has the same ones.
    defaults = saber_config("7b").tokens
    found = {}
    for ours, theirs in TOKENS.items():
        value = config.get(theirs, config.get(theirs.replace("_index", "_id")))
        found[ours] = getattr(defaults, ours) if value is None else value
    return TokenIds(**found)


def to_hf(cfg: SaberConfig, *, dtype: str) -> dict[str, Any]:
    """A config.json that transformers 4.57 and 5.23 both read alike.

    Rotary settings stand in the older place, which version 5 also reads, while version 4 would
    ignore the newer one; and tied embeddings are denied on both levels, as each version asks
    another.
    """
    text, vision, audio = cfg.text, cfg.vision, cfg.audio
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen2_5_omni_thinker",
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
        "position_id_per_seconds": cfg.positions_per_second,
        "seconds_per_chunk": cfg.seconds_per_chunk,
        **_put(cfg.tokens, TOKENS),
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            **FIXED["text_config"],
            **_put(text, TEXT),
            "head_dim": text.head_dim,
            "rope_theta": text.rope_theta,
            "rope_scaling": {
                "mrope_section": list(text.mrope_section),
                "rope_type": "default",
                "type": "default",
            },
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "qwen2_5_omni_vision_encoder",
            **FIXED["vision_config"],
            **_put(vision, VISION),
            "embed_dim": vision.width,
            "tokens_per_second": cfg.positions_per_second,
        },
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            **FIXED["audio_config"],
            **_put(audio, AUDIO),
            "num_hidden_layers": audio.layers,
        },
    }


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of either generation of transformers as both read it alike; see `to_hf`.

    What transformers 5 wrote loses nothing and gains the older place of the rotary settings, and
    whether the head is tied is said on both levels.
    """
    result = _older_rotary(config)
    part = result.get("thinker_config", result)
    text = part["text_config"]
    tied = bool(part.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    part["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
    return result


def _older_rotary(config: Any) -> Any:
    """The same in every section, the talker's included."""
    if not isinstance(config, Mapping):
        return config
    result = {key: _older_rotary(value) for key, value in config.items()}
    rotary = config.get("rope_parameters")
    if isinstance(rotary, Mapping) and "rope_theta" in rotary and "rope_theta" not in config:
        result["rope_theta"] = rotary["rope_theta"]
        rest = {key: value for key, value in rotary.items() if key != "rope_theta"}
        if "mrope_section" in rest:
            result["rope_scaling"] = rest | {"type": rest.get("rope_type", "default")}
    return result


def _put(values: Any, table: Mapping[str, str]) -> dict[str, Any]:
    put = {theirs: getattr(values, ours) for ours, theirs in table.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in put.items()}
