import dataclasses
import json

import pytest

from saber_jax.models.config import SaberConfig, saber_config


@pytest.mark.parametrize("name", ["tiny", "3b", "7b"])
def test_a_config_survives_json(name):
    config = saber_config(name)
    assert SaberConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(ValueError, match="No model size '70b'; the sizes are tiny, 3b, 7b"):
        saber_config("70b")


def test_missing_and_unknown_fields_are_named_with_their_section():
    values = saber_config("tiny").to_dict()
    del values["text"]["width"]
    values["text"]["wdith"] = 128
    with pytest.raises(ValueError, match=r"missing \['text.width'\], unknown \['text.wdith'\]"):
        SaberConfig.from_dict(values)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("text", {"mrope_section": (4, 6, 5)}, "mrope_section must sum to half"),
        ("text", {"kv_heads": 3}, "multiple of text.kv_heads"),
        ("vision", {"full_attention_layers": (4,)}, r"names layers \[4\]"),
        ("vision", {"heads": 3}, "vision.width must be a multiple"),
        ("audio", {"n_window": 99}, "n_window must be even"),
    ],
)
def test_sizes_that_cannot_work_are_refused(section, change, message):
    config = getattr(saber_config("tiny"), section)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_towers_of_different_width_are_refused():
    config = saber_config("tiny")
    audio = dataclasses.replace(config.audio, out_width=64)
    with pytest.raises(ValueError, match=r"AudioConfig.out_width must equal text.width"):
        dataclasses.replace(config, audio=audio)
