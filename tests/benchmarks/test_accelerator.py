"""benchmarks.accelerator: which variants run, and what is said of those that do not."""

import argparse
import json

import numpy as np
import pytest

from benchmarks.accelerator import running
from benchmarks.accelerator import task as tasks
from saber_jax.batch import Branch


def task(variant):
    return tasks.Task(size="7b", variant=variant, seconds=1, quick=True)


@pytest.mark.parametrize(
    ("variant", "stage", "peer"),
    [
        ("cadpo", "cadpo", ""),
        ("sft_flash", "sft", "flash"),
        ("generate_8_sdpa", "generate", "sdpa"),
    ],
)
def test_a_variant_names_its_stage_and_its_peer(variant, stage, peer):
    assert (task(variant).stage, task(variant).peer) == (stage, peer)


def test_a_variant_without_time_is_named_and_not_begun():
    flags = argparse.Namespace(minutes=0.1, size="7b", quick=True)
    found = running.measured(flags, ["cadpo", "sft"])
    assert [figures["skipped"] for figures in found.values()] == ["no time was left"] * 2


@pytest.mark.parametrize("variant", ["cadpo", "sft"])
def test_rows_hold_the_whole_example_in_slots_that_the_kernel_takes(variant):
    _, example = task(variant).pair()
    batch = tasks.batch_of(task(variant), example)
    answers = 2 if variant == "cadpo" else 1
    tokens = len(example.prompt.tokens) + answers * len(example.responses[0].tokens)
    assert (np.asarray(batch.text.segments) > 0).sum() == tokens
    assert batch.text.tokens.shape[1] % 128 == 0
    assert (np.asarray(batch.text.branch) == Branch.REJECTED).any() == (variant == "cadpo")


def test_ratios_are_of_what_was_measured(capsys):
    flags = argparse.Namespace(minutes=1, size="7b", quick=False)
    found = {
        "cadpo": {"seconds": 0.5, "mfu": 0.41, "finite": True, "device": "NVIDIA H200"},
        "cadpo_sdpa": {"seconds": 5.0, "finite": True},
        "sft": {"skipped": "no time was left"},
    }
    with pytest.raises(SystemExit) as ended:
        running.report(flags, list(found), found)
    said = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and said["value"] == 0.41
    assert said["over_sdpa"] == {"cadpo": 10.0, "sft": None, "generate_8": None}


def test_a_variant_that_failed_makes_the_benchmark_fail():
    flags = argparse.Namespace(minutes=1, size="7b", quick=True)
    with pytest.raises(SystemExit) as ended:
        running.report(flags, ["cadpo"], {"cadpo": {"failed": ["ValueError: ..."]}})
    assert ended.value.code == 1
