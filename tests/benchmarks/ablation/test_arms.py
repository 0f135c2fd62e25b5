"""The arms differ in what they are about, and in nothing else."""

import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from benchmarks.ablation import arms, material
from benchmarks.ablation.arms import ARMS
from configs import cadpo, sft
from saber_jax.data import sed
from saber_jax.runs.identity import identity
from saber_jax.train.preference import Preference
from tests import synthetic

ROOT = Path("/runs/ablation/seed_3")
STAGE_2 = [name for name, arm in ARMS.items() if arm.stage == "cadpo"]


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_changes_what_it_names_and_nothing_else(name):
    own = identity(arms.config_of(ROOT, 3, name))
    usual = (sft if ARMS[name].stage == "sft" else cadpo).get_config("tiny")
    usual.root, usual.seed = str(ROOT), 3
    before = identity(usual)
    changed = {key for key in before if before[key] != own[key]}
    reads = {"init.checkpoint", "data.path", "data.pairs"}
    assert changed - reads == {key for key in ARMS[name].settings if before[key] != own[key]}
    assert before.keys() == own.keys()


def test_more_sft_takes_the_peak_of_stage_2_and_the_end_of_stage_1():
    peaks = [arms.config_of(ROOT, 3, name).optimizer.peak_lr for name in arms.MORE_SFT]
    first, second = (stage.get_config("tiny").optimizer for stage in (sft, cadpo))
    assert peaks == [second.peak_lr, first.peak_lr * first.final_fraction]


@pytest.mark.parametrize("name", arms.MORE_SFT)
def test_more_sft_answers_six_sections_and_nothing_else_as_pairs_do(name):
    tasks = arms.config_of(ROOT, 3, name).data.tasks.to_dict()
    assert {task for task, weight in tasks.items() if weight} == {"sed"}


@pytest.mark.parametrize("name", ARMS)
def test_the_command_that_trains_an_arm_gives_its_config(name, monkeypatch):
    config = arms.config_of(ROOT, 3, name)
    (train,) = [s for s in arms.chain_of(ROOT, 3, [name]) if s.leaves == config.workdir]
    monkeypatch.setattr(sys, "argv", list(train.command[2:]))  # Which config_flags reads too.
    typed = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=typed)
    typed(sys.argv)
    assert identity(typed.config) == identity(config)


def test_arms_of_stage_2_see_as_many_examples():
    seen = set()
    for name in (*STAGE_2, *arms.MORE_SFT):
        config = arms.config_of(ROOT, 3, name)
        assert config.init.checkpoint == f"{ROOT}/sft"
        data = config.data
        seen.add((config.steps, data.batch_rows, data.batch_examples, data.segments))
    assert len(seen) == 1


@pytest.mark.parametrize("name", STAGE_2)
def test_a_loss_of_an_arm_is_one_that_training_takes(name):
    Preference(**arms.config_of(ROOT, 3, name).loss)


def test_all_arms_stand_on_one_corpus_one_stage_1_and_steps_that_come_before():
    steps = arms.chain_of(ROOT, 3, list(ARMS))
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for number, step in enumerate(steps):
        assert set(step.after) <= set(names[:number])
    for shared in ("corpus", "records", "sft", "pairs", "pairs_sample"):
        assert names.count(shared) == 1
    tested = [step for step in steps if "saber_jax.evaluation.run" in step.command]
    assert len(tested) == len(ARMS)
    data = {step.command[step.command.index("--data") + 1] for step in tested}
    assert data == {f"{ROOT}/records"}


def test_an_arm_of_its_own_needs_no_pairs_and_no_other_arm():
    names = [step.name for step in arms.chain_of(ROOT, 3, ["label_only"])]
    assert names == [
        *("corpus", "records", "records_label", "arms_label_only", "evaluate_arms_label_only")
    ]


def test_what_the_tiny_chain_left_is_used_again():
    """Its stamps say that they were made by the same commands."""
    from launch import steps

    config = cadpo.get_config("tiny")
    config.root, config.seed = str(ROOT), 3
    settings = (f"--config.root={ROOT}", "--config.seed=3")
    usual = {step.name: step for step in steps.steps(config, "configs/cadpo.py:tiny", settings)}
    ours = {step.name: step for step in arms.chain_of(ROOT, 3, ["sed", "anchored"])}
    for name in ("corpus", "records", "sft", "pairs", "cadpo", "evaluate_sft", "evaluate_cadpo"):
        made = (usual[name].does or usual[name].command, usual[name].after)
        assert made == (ours[name].does or ours[name].command, ours[name].after)


def test_pairs_of_arms_are_mined_by_the_method_that_they_are_called_after():
    mined = {step.name: step.command for step in arms.chain_of(ROOT, 3, list(ARMS))}
    for name, method in (("pairs", "withhold"), ("pairs_sample", "sample")):
        assert mined[name][mined[name].index("--method") + 1] == method


@pytest.mark.parametrize("index", [0, 1])
def test_targets_of_stage_1_conclude_what_the_record_does(index):
    record = synthetic.record(index)
    whole = sed.target_text(record.annotation)
    label, reason = material.label(record), material.reason(record)
    assert sed.conclusion(label) == sed.conclusion(reason) == sed.conclusion(whole)
    assert sorted(reason.split("\n")) == sorted(whole.split("\n"))
    assert reason.startswith("[sentiment_analysis]") and reason != whole
    assert "\n" not in label and len(label) < len(whole) / 3


def test_a_random_negative_is_another_clip_of_the_same_language_and_another_emotion():
    clips = {
        f"{language}{number}": {
            "language": language,
            "emotion": emotion,
            "target": f"{language} {number} {emotion}",
        }
        for language in ("en", "zh")
        for number, emotion in enumerate(["unease", "sorrow", "contempt"] * 3)
    }
    pairs = [
        {"clip_id": clip, "chosen": about["target"], "rejected": "r", "withheld": "audio"}
        for clip, about in clips.items()
    ]
    drawn = material.random_negatives(pairs, clips, seed=1)
    assert [pair["chosen"] for pair in drawn] == [pair["chosen"] for pair in pairs]
    for pair in drawn:
        own = clips[pair["clip_id"]]
        language, _, emotion = pair["rejected"].split()
        assert language == own["language"] and emotion != own["emotion"]
        assert pair["withheld"] == ""
    assert drawn == material.random_negatives(pairs, clips, seed=1)
    assert drawn != material.random_negatives(pairs, clips, seed=2)
