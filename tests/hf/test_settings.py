"""A setting of config.json is used as transformers does, changes nothing there, or is refused."""

import copy
import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from saber_jax.hf import settings
from saber_jax.hf.config import from_hf, portable, to_hf
from saber_jax.hf.load import load_params
from saber_jax.models.config import SaberConfig, TextConfig
from tests.hf import reference
from tests.models.batches import CONFIG, Audio, Image, Text, Video, conversation
from tests.models.cases import LOGITS, relative, row
from tests.models.gradients import summed_loss_and_gradients

# Every field of transformers' four classes, but for the labels, names and outputs that all models
# have. A release that brings a new one fails here until somebody has looked at it.
USED = {
    "": {
        "audio_token_index": 11,
        "image_token_index": 11,
        "video_token_index": 11,
        "audio_start_token_id": 11,
        "audio_end_token_id": 11,
    },
    "text_config": {
        "vocab_size": 121,
        "hidden_size": 36,
        "intermediate_size": 81,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
        "max_position_embeddings": 99,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 2, 4]},
    },
    "vision_config": {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 45,
        "num_heads": 4,
        "out_hidden_size": 36,
        "fullatt_block_indexes": [0],
    },
    "audio_config": {
        "encoder_layers": 3,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 73,
        "d_model": 44,
        "output_dim": 36,
        "max_source_positions": 100,
    },
}
REFUSED = {
    "": {"position_id_per_seconds": 30, "seconds_per_chunk": 4},
    "text_config": {
        "hidden_act": "gelu",
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "attention_dropout": 0.1,
    },
    "vision_config": {
        "hidden_act": "gelu",
        "in_channels": 4,
        "patch_size": 16,
        "spatial_merge_size": 4,
        "temporal_patch_size": 1,
        "window_size": 56,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "axial"},
    },
    "audio_config": {
        "num_mel_bins": 80,
        "n_window": 50,
        "scale_embedding": True,
        "activation_function": "relu",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
    },
}
INERT = {
    "": {"user_token_id": 11, "initializer_range": 0.5},
    "text_config": {
        "initializer_range": 0.5,
        "use_cache": False,
        "sliding_window": 2,
        "max_window_layers": 1,
        "pad_token_id": 5,
        "bos_token_id": 5,
        "eos_token_id": 5,
    },
    "vision_config": {"initializer_range": 0.5},
    "audio_config": {"initializer_range": 0.5},
}
ELSEWHERE = {
    "": {*settings.SECTIONS, "tie_word_embeddings"},  # A tied head: test_checkpoints.py.
    "text_config": {"tie_word_embeddings"},
    "vision_config": set(),
    "audio_config": set(),
}
WRITTEN = to_hf(CONFIG, dtype="float32")


def cases(table):
    return [
        pytest.param(section, key, value, id=f"{section}.{key}".strip("."))
        for section, values in table.items()
        for key, value in values.items()
    ]


def varied(section, key, value):
    config = copy.deepcopy(WRITTEN)
    part = config[section] if section else config
    for alias, name in settings.ALIASES[section].items():
        if name == key:
            part.pop(alias, None)
    part[key] = value
    if key == "rope_parameters" and section == "text_config":
        del config[section]["rope_scaling"], config[section]["rope_theta"]
    return config


@pytest.mark.parametrize("section", USED)
def test_every_field_of_transformers_config_is_looked_at(section):
    whole = transformers.Qwen2_5OmniThinkerConfig()
    kind = type(getattr(whole, section) if section else whole)
    general = {field.name for field in dataclasses.fields(transformers.PretrainedConfig)}
    fields = {field.name for field in dataclasses.fields(kind)} - general
    seen = {*USED[section], *REFUSED[section], *INERT[section], *ELSEWHERE[section]}
    assert fields == seen - (general - fields)


@pytest.mark.parametrize(("section", "key", "value"), cases(USED))
def test_a_used_setting_reaches_the_network_alone(section, key, value):
    config = varied(section, key, value)
    if (section, key) in WIDTHS:
        # The towers meet in this width, so it cannot change in one of them alone.
        for part, name in WIDTHS:
            config[part][name] = value
    changed = _flat(from_hf(config)).items() - _flat(CONFIG).items()
    assert changed
    for name, got in changed:
        assert got in _leaves(value), name


WIDTHS = [
    ("text_config", "hidden_size"),
    ("vision_config", "out_hidden_size"),
    ("audio_config", "output_dim"),
]


def _leaves(value):
    if isinstance(value, dict):
        return [tuple(v) if isinstance(v, list) else v for v in value.values()]
    return [tuple(value)] if isinstance(value, list) else [value]


def _flat(cfg: SaberConfig) -> dict:
    return {
        f"{part}.{name}": value
        for part, values in cfg.to_dict().items()
        if isinstance(values, dict)
        for name, value in values.items()
    }


@pytest.mark.parametrize(("section", "key", "value"), cases(REFUSED))
def test_a_setting_that_the_network_does_not_have_is_refused_by_name(section, key, value):
    with pytest.raises(ValueError) as error:
        from_hf(varied(section, key, value))
    assert f"{section}.{key}".strip(".") in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "quantization_config", {"quant_method": "awq"}),
        ("", "image_token_id", 11),
        ("", "mrope_interleaved", True),
        ("text_config", "attention_bias", True),
        ("text_config", "num_hidden_layers", "3"),
        ("text_config", "rms_norm_eps", None),
        ("text_config", "rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("text_config", "model_type", "qwen2"),
        ("vision_config", "tokens_per_second", 2),
        ("vision_config", "embed_dim", 64),
        ("vision_config", "head_dim", 8),
        ("vision_config", "rope_theta", 5000.0),
        ("vision_config", "fullatt_block_indexes", [1.0]),
        ("audio_config", "num_hidden_layers", 3),
        ("audio_config", "encoder_layerdrop", 0.1),
    ],
)
def test_a_setting_nobody_knows_or_in_two_minds_is_refused_by_name(section, key, value):
    config = copy.deepcopy(WRITTEN)
    (config[section] if section else config)[key] = value
    with pytest.raises(ValueError) as error:
        from_hf(config)
    assert f"{section}.{key}".strip(".") in str(error.value)


def test_a_config_of_another_model_is_refused_as_that():
    with pytest.raises(ValueError, match=r"another kind.* got 'qwen2_5_vl'"):
        from_hf({"model_type": "qwen2_5_vl", "hidden_size": 8})


TALK = conversation(
    1, Text(3), Image((1, 12, 20)), Audio(250), Text(5), Video((2, 4, 6), 0.5), Audio(30), Text(2)
)


@pytest.fixture(scope="module")
def model():
    return reference.thinker()


def logits(model):
    with torch.no_grad():
        return model(**reference.inputs([TALK]), use_cache=False).logits.numpy()


@pytest.mark.parametrize(("section", "key", "value"), cases(INERT))
def test_an_inert_setting_changes_nothing_in_transformers_either(model, section, key, value):
    config = varied(section, key, value)
    assert from_hf(config) == CONFIG
    kind = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    other = kind._from_config(
        transformers.Qwen2_5OmniThinkerConfig(**config), attn_implementation="eager"
    )
    other.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(logits(other.eval()), logits(model))


OTHER = dataclasses.replace(
    CONFIG,
    text=TextConfig(
        layers=2,
        width=36,
        heads=12,
        kv_heads=3,
        head_dim=16,
        mlp_dim=81,
        vocab=121,
        rope_theta=1e4,
        mrope_section=(2, 2, 4),
        norm_eps=1e-2,
        max_positions=99,
    ),
    vision=dataclasses.replace(CONFIG.vision, depth=4, width=64, heads=4, mlp_dim=45, out_width=36),
    audio=dataclasses.replace(CONFIG.audio, layers=3, width=44, heads=2, mlp_dim=73, out_width=36),
)


def test_used_settings_give_transformers_numbers(tmp_path):
    """All of them at once, away from CONFIG's, through the files that transformers saves."""
    model = reference.thinker(OTHER, seed=3)
    model.save_pretrained(tmp_path)
    params, cfg = load_params(tmp_path)
    assert cfg == OTHER
    got = summed_loss_and_gradients(params, row(TALK), cfg)[2]
    assert relative(got[0, : len(TALK.tokens)], logits(model)[0]) < LOGITS


def test_a_config_of_transformers_is_one_of_ours_also_after_export_made_it_portable(model):
    saved = json.loads(model.config.to_json_string(use_diff=False))
    assert from_hf(saved) == from_hf(portable(saved)) == CONFIG


def test_an_export_says_nothing_that_it_would_not_load():
    assert from_hf(json.loads(json.dumps(WRITTEN))) == CONFIG
    for section in ("", *settings.SECTIONS):
        said = WRITTEN[section] if section else WRITTEN
        assert settings.FIXED[section].items() <= said.items()
