"""Every numeric setting has a range, and what lies outside it is named before anything happens."""

import math

import pytest

from configs import cadpo, ranges, sft

CONFIGS = [(stage, variant) for stage in (sft, cadpo) for variant in sft.VARIANTS]


@pytest.mark.parametrize(("stage", "variant"), CONFIGS)
def test_the_configs_are_within_range_and_no_number_lacks_one(stage, variant):
    config = stage.get_config(variant)
    ranges.check(config)
    settings = [name for name, _ in ranges.numbers(config.to_dict())]
    assert len(settings) > 30
    assert [name for name in settings if ranges.named(name) is None] == []


ABSURD = [
    ("steps", 0, "at least 1"),
    ("steps", -5, "at least 1"),
    ("checkpoint_every", 0, "at least 1"),
    ("metrics_every", 0, "at least 1"),
    ("data.batch_rows", 0, "at least 1"),
    ("data.length", -1, "at least 1"),
    ("data.max_bad_fraction", 1.5, "at least 0 and at most 1"),
    ("data.withhold", -0.1, "at least 0 and at most 1"),
    ("data.tasks.sed", -1.0, "at least 0"),
    ("mesh.fsdp", -2, "at least -1"),
    ("optimizer.peak_lr", 0.0, "above 0"),
    ("optimizer.peak_lr", -1.0, "above 0"),
    ("optimizer.peak_lr", math.inf, "finite and above 0"),
    ("optimizer.peak_lr", math.nan, "finite and above 0"),
    ("optimizer.b2", 1.0, "at least 0 and at most 1"),
    ("lora.dropout", 1.0, "at least 0 and at most 1"),
    ("seed", 2**40, "at most"),
]


@pytest.mark.parametrize(("name", "value", "wanted"), ABSURD)
def test_an_absurd_value_is_refused_with_name_range_and_value(name, value, wanted):
    config = sft.get_config("tiny")
    with config.unlocked():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=rf"config\.{name} must be .*{wanted}.*, got {value}"):
        ranges.check(config)


def test_all_that_is_wrong_is_said_at_once():
    config = cadpo.get_config("tiny")
    config.steps, config.loss.beta, config.generation.batch_size = 0, -1.0, 0
    with pytest.raises(ValueError) as refused:
        ranges.check(config)
    for name in ("config.steps", "config.loss.beta", "config.generation.batch_size"):
        assert name in str(refused.value)
