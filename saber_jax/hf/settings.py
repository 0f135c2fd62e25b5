"""Settings of a thinker's config.json: used ones, ones with a fixed value, ones without an effect.

A setting that is in none of these tables and has a non-empty value is refused by name, so that the
network always computes what the config describes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from saber_jax.data import media, tmrope

SECTIONS = ("text_config", "vision_config", "audio_config")

# Our field -> their key. A config must say these, because no default is safe: the vision width of
# transformers' own defaults is not the released one.
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
TABLES = {"text_config": TEXT, "vision_config": VISION, "audio_config": AUDIO}

# Settings with one value in every released model, and here: the network computes nothing else, or
# data/media.py and data/tmrope.py prepare clips for nothing else. "" is the thinker itself.
# Dropout would change training, and neither the released models nor ours have any outside of LoRA.
FIXED: dict[str, dict[str, Any]] = {
    "": {
        "model_type": "qwen2_5_omni_thinker",
        "position_id_per_seconds": tmrope.POSITIONS_PER_SECOND,
        "seconds_per_chunk": tmrope.SECONDS_PER_CHUNK,
    },
    "text_config": {
        "model_type": "qwen2_5_omni_text",
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_dropout": 0,
    },
    "vision_config": {
        "model_type": "qwen2_5_omni_vision_encoder",
        "hidden_act": "silu",
        "in_channels": 3,
        "patch_size": media.PATCH,
        "temporal_patch_size": media.TEMPORAL_PATCH,
        "spatial_merge_size": media.MERGE,
        "window_size": media.WINDOW,
        # vLLM takes positions from this one, transformers from position_id_per_seconds.
        "tokens_per_second": tmrope.POSITIONS_PER_SECOND,
    },
    "audio_config": {
        "model_type": "qwen2_5_omni_audio_encoder",
        "activation_function": "gelu",
        "scale_embedding": False,
        "num_mel_bins": media.MELS,
        "n_window": media.N_WINDOW,
        "dropout": 0,
        "attention_dropout": 0,
        "activation_dropout": 0,
        "encoder_layerdrop": 0,
    },
}

# Second names of a setting. transformers lets the second one win, so they have to agree.
ALIASES = {
    "": {"image_token_id": "image_token_index", "video_token_id": "video_token_index"}
    | {"audio_token_id": "audio_token_index"},
    "text_config": {},
    "vision_config": {
        "embed_dim": "hidden_size",
        "in_chans": "in_channels",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "depth",
    },
    "audio_config": {
        "num_hidden_layers": "encoder_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "intermediate_size": "encoder_ffn_dim",
    },
}

# Settings that do not change what the thinker computes from its weights. A pad token of the text
# tower keeps its embedding from learning, and nothing here ever reads that embedding.
_DRAWN = {"initializer_range", "init_std"}
INERT = {
    "": {*SECTIONS, *_DRAWN, "user_token_id", "vision_token_id", "ignore_index"},
    "text_config": {*_DRAWN, "use_cache", "sliding_window", "max_window_layers"},
    "vision_config": _DRAWN,
    "audio_config": _DRAWN,
}

# Read by config.py with care of their own.
ROTARY = {
    "text_config": {"head_dim", "layer_types", "rope_theta", "rope_scaling", "rope_parameters"},
    "vision_config": {"rope_theta", "rope_parameters"},
}

# What transformers 4 and 5 write into every section of every model: how to load, print and
# generate, labels of classifiers, and what other architectures have.
_GENERIC_WORDS = """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention
    architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty
    max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id
    prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16
"""
GENERIC = frozenset(_GENERIC_WORDS.split())


def problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields every setting of a thinker's config that this network does not support."""
    if config.get("quantization_config"):
        yield "quantization_config is set: weights are read as float32, float16 or bfloat16 only"
    for name in ("", *SECTIONS):
        section = config if name == "" else config.get(name) or {}
        where = f"{name}." if name else ""
        table = TABLES.get(name, {})
        for key in table.values():
            if section.get(key) is None:
                yield f"{where}{key} is missing"
            elif wrong := _wrong_type(key, section[key]):
                yield f"{where}{key} must be {wrong}, got {section[key]!r}"
        fixed, aliases = FIXED[name], ALIASES[name]
        for key, value in fixed.items():
            got = section.get(key)
            if got is not None and (got != value or isinstance(got, bool) != (value is False)):
                yield f"{where}{key} must be {value!r}, got {got!r}"
        for alias, key in aliases.items():
            a, b = section.get(alias), section.get(key)
            if None not in (a, b) and a != b:
                yield f"{where}{alias} is {a!r} and {key} is {b!r}; they are one setting"
        known = {*table.values(), *fixed, *aliases, *INERT[name], *ROTARY.get(name, ()), *GENERIC}
        known |= {*TOKENS.values(), "quantization_config"} if name == "" else set()
        # What is empty, zero or off in a setting that we do not know leaves things as they are.
        for key in sorted(key for key, value in section.items() if key not in known and value):
            yield f"{where}{key} = {section[key]!r} is not in this network"


def _wrong_type(key: str, value: Any) -> str | None:
    """What kind of value a setting needs, if it has another kind; else None."""
    if key == "fullatt_block_indexes":
        right = isinstance(value, list | tuple) and all(type(index) is int for index in value)
        return None if right else "a list of layers' numbers"
    if key == "rms_norm_eps":
        return None if type(value) in (int, float) and value >= 0 else "a number"
    if key in FIXED["vision_config"] or key in FIXED["audio_config"]:
        return None  # Said already.
    return None if type(value) is int and value > 0 else "a whole number above zero"
