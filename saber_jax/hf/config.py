"""config.json of the Qwen2.5-Omni thinker against SaberConfig, both ways."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from saber_jax.hf.settings import AUDIO, FIXED, SECTIONS, TABLES, TEXT, TOKENS, VISION, problems
from saber_jax.models.config import (
    AudioConfig,
    SaberConfig,
    TextConfig,
    TokenIds,
    VisionConfig,
    saber_config,
)

ARCHITECTURE = "Qwen2_5OmniThinkerForConditionalGeneration"
OMNI_ARCHITECTURE = "Qwen2_5OmniForConditionalGeneration"
MODEL_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")
LAYOUTS = ("thinker", "omni")


def thinker(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The thinker's part of a config.json, whether it stands alone or inside the omni model's."""
    return config.get("thinker_config", config)


def from_hf(config: Mapping[str, Any]) -> SaberConfig:
    """The model that a config.json describes.

    Raises one ValueError that names every missing setting and every one that this network does not
    have (saber_jax/hf/settings.py).
    """
    kind = config.get("model_type")
    if not isinstance(kind, str | None) or kind not in (None, *MODEL_TYPES):
        raise ValueError(
            f"config.json is of a model of another kind: model_type must be one of "
            f"{', '.join(MODEL_TYPES)}, got {kind!r}; give a Qwen2.5-Omni or its thinker"
        )
    whole, config = config, thinker(config)
    if not isinstance(config, Mapping):
        raise ValueError(f"config.json must hold an object as thinker_config, got {config!r}")
    for name in SECTIONS:
        if not isinstance(section := config.get(name) or {}, Mapping):
            raise ValueError(f"config.json must hold an object as {name}, got {section!r}")
    wrong = list(problems(config))
    if whole is not config and whole.get("quantization_config"):
        wrong.append("quantization_config is set: weights are read as float only")
    text = config.get("text_config") or {}
    rope, rope_wrong = _rope(text)
    wrong += rope_wrong + list(_vision_rope(config.get("vision_config") or {}))
    layers = text.get("layer_types") or ()
    if set(layers) - {"full_attention"}:
        wrong.append(f"text_config.layer_types must all be 'full_attention', got {layers}")
    tokens = _tokens(config)
    vocab = text.get("vocab_size")
    wrong += [
        f"{TOKENS[name]} {value!r} is outside the vocabulary of {vocab}"
        for name, value in dataclasses.asdict(tokens).items()
        if type(value) is not int or value < 0 or (type(vocab) is int and value >= vocab)
    ]
    if wrong:
        raise ValueError(
            f"config.json is not one of a Qwen2.5-Omni thinker: {'; '.join(wrong)}. Only sizes may "
            "differ from the released models, because the network computes nothing else"
        )
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    picked = {name: _pick(config[name], table) for name, table in TABLES.items()}
    vision = picked["vision_config"]
    vision["full_attention_layers"] = tuple(vision["full_attention_layers"])
    return SaberConfig(
        text=TextConfig(head_dim=head_dim, **rope, **picked["text_config"]),
        vision=VisionConfig(**vision),
        audio=AudioConfig(**picked["audio_config"]),
        tokens=tokens,
    )


def _pick(section: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    return {ours: section[theirs] for ours, theirs in table.items()}


def _rope(text: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Rotary settings, which transformers 5 writes in another place than 4 does."""
    places = {name: text.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    wrong = [
        f"text_config.{name} must be a JSON object, got {place!r}"
        for name, place in places.items()
        if not isinstance(place, Mapping)
    ]
    if wrong:
        return {}, wrong
    thetas = [p["rope_theta"] for p in (*places.values(), text) if p.get("rope_theta") is not None]
    sections = [place["mrope_section"] for place in places.values() if place.get("mrope_section")]
    if not thetas:
        wrong.append("text_config.rope_theta is missing")
    elif any(theta != thetas[0] or not _positive(theta) for theta in thetas):
        wrong.append(f"text_config.rope_theta must be one number above zero, got {thetas}")
    if not sections or any(len(s) != 3 or s != sections[0] for s in sections):
        got = sections if len(sections) > 1 else [*sections, None][0]
        wrong.append(f"text_config.rope_scaling.mrope_section must be 3 sizes, got {got}")
    for name, place in places.items():
        for key, value in place.items():
            if key in ("rope_type", "type"):
                if value not in (None, "default", "mrope"):
                    wrong.append(f"text_config.{name}.{key} must be 'default', got {value!r}")
            elif key not in ("mrope_section", "rope_theta") and value:
                wrong.append(f"text_config.{name}.{key} = {value!r} is not in this network")
    if wrong:
        return {}, wrong
    return {"rope_theta": float(thetas[0]), "mrope_section": tuple(sections[0])}, []


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _vision_rope(vision: Mapping[str, Any]) -> Iterator[str]:
    """The rotary embedding of pictures, which has no settings in the released models."""
    rope = vision.get("rope_parameters") or {}
    fixed = {"rope_theta": (10000.0,), "rope_type": ("axial", "default")}
    if vision.get("rope_theta") not in (None, *fixed["rope_theta"]):
        yield f"vision_config.rope_theta = {vision['rope_theta']!r} is not in this network"
    for key, value in rope.items():
        if value is not None and value not in fixed.get(key, ()):
            yield f"vision_config.rope_parameters.{key} = {value!r} is not in this network"


def _tokens(config: Mapping[str, Any]) -> TokenIds:
    # Configs omit ids that equal the release's, and every release has the same ones.
    defaults = saber_config("7b").tokens
    found = {}
    for ours, theirs in TOKENS.items():
        value = config.get(theirs, config.get(theirs.replace("_index", "_id")))
        found[ours] = getattr(defaults, ours) if value is None else value
    return TokenIds(**found)


def to_hf(cfg: SaberConfig, *, dtype: str, layout: str = "thinker") -> dict[str, Any]:
    """A config.json that transformers 4.57 and 5.23 both read alike.

    The layout "omni" is the config of the whole model with speech switched off, which vLLM and
    ms-swift expect. Raises ValueError for an unknown layout.

    Rotary settings are in the older place, which version 5 also reads; version 4 would ignore the
    newer one. Both levels say that the embedding is not tied to the head, because version 4 asks
    one of them and version 5 the other.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    thinker = _thinker_to_hf(cfg, dtype=dtype)
    if layout == "thinker":
        return {"architectures": [ARCHITECTURE], **thinker}
    return {
        "architectures": [OMNI_ARCHITECTURE],
        "model_type": "qwen2_5_omni",
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
        "enable_audio_output": False,
        "thinker_config": thinker,
    }


def _thinker_to_hf(cfg: SaberConfig, *, dtype: str) -> dict[str, Any]:
    text, vision, audio = cfg.text, cfg.vision, cfg.audio
    return {
        **FIXED[""],
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
        **_put(cfg.tokens, TOKENS),
        "text_config": {
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
            **FIXED["vision_config"],
            **_put(vision, VISION),
            "embed_dim": vision.width,
        },
        "audio_config": {
            **FIXED["audio_config"],
            **_put(audio, AUDIO),
            "num_hidden_layers": audio.layers,
        },
    }


def tied_by(config: Mapping[str, Any]) -> list[bool]:
    """Whether transformers 4 and transformers 5 take the embedding as the head."""
    part = thinker(config)
    text = part.get("text_config") or {}
    return [bool(level.get("tie_word_embeddings")) for level in (text, part)]


def portable(config: Mapping[str, Any], *, tied: bool | None = None) -> dict[str, Any]:
    """A config.json of either generation of transformers as both read it alike; see `to_hf`.

    What transformers 5 wrote loses nothing and gains the older place of the rotary settings. Both
    levels say whether the head is `tied`; None is what the config says on any level.
    """
    result = _older_rotary(config)
    part = result.get("thinker_config", result)
    text = part["text_config"]
    tied = any(tied_by(config)) if tied is None else tied
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
