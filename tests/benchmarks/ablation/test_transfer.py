"""Clips from elsewhere: checked before anything is trained, then evaluated by every arm."""

import dataclasses
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.ablation import __main__ as ablation
from benchmarks.ablation import arms, compare, transfer
from benchmarks.ablation.transfer import Transfer
from configs import sft
from data_prep.records import dataset
from saber_jax.data.records import Record
from tests import synthetic
from tests.benchmarks.ablation import answers

ROOT = Path("/runs/ablation/seed_3")
AGREE = {"emotion": "happy", "face": "happy", "voice": "happy", "words": "happy"}
CONFLICT = {"emotion": "contempt", "face": "happy", "voice": "angry", "words": "happy"}
RECIPE = sft.get_config("tiny")
SAMPLING = {
    flag.removeprefix("--"): float(value)
    for flag, value in zip(RECIPE.sampling[::2], RECIPE.sampling[1::2], strict=True)
}


def clip(number: int, labels: Mapping[str, str], **changes) -> Record:
    record = dataclasses.replace(synthetic.record(number), labels=labels)
    return dataclasses.replace(record, provenance={"sampling": SAMPLING}, **changes)


FITTING = [clip(0, AGREE), clip(1, CONFLICT), clip(2, AGREE | {"words": "sad"})]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> bytes:
    return synthetic.tokenizer(tmp_path_factory.mktemp("vocabulary")).path.read_bytes()


@pytest.fixture
def built(tmp_path, vocabulary):
    def build(records: list[Record], split: str = "test") -> Transfer:
        folder = tmp_path / "acted" / "records"
        dataset.write(folder, {split: range(len(records))}, records.__getitem__)
        (folder / "tokenizer.model").write_bytes(vocabulary)
        return Transfer(folder, split)

    return build


def test_clips_of_the_recipes_size_are_counted_and_need_no_remark(built):
    about = built(FITTING).about
    # Without a conflict_type, words that say something else are a conflict too.
    assert (about["records"], about["consistent"], about["conflicting"]) == ("acted/records", 1, 2)
    assert transfer.remarks(about) == []


def test_clips_that_training_would_leave_out_are_named_with_the_reason(built):
    wide = clip(3, AGREE, frames=np.zeros((4, 112, 112, 3), np.uint8))
    long = clip(4, CONFLICT, audio=np.zeros(16_000 * 30, np.int16))
    about = built([*FITTING, wide, long]).about
    assert f"frame_patches 64 > {RECIPE.data.frame_patches}" in about["too_large"]["clip3"]
    assert set(about["too_large"]) == {"clip3", "clip4"}
    assert f"chunks 15 > {RECIPE.data.chunks}" in about["too_large"]["clip4"]
    (sentence,) = transfer.remarks(about)
    assert sentence.startswith("2 of 5 clips are larger") and "clip3 (frame_patches" in sentence


def test_clips_that_were_decoded_in_another_way_are_named(built):
    slow = dataclasses.replace(FITTING[0], clip_id="slow", provenance={"sampling": {"fps": 1.0}})
    (sentence,) = transfer.remarks(built([*FITTING, slow]).about)
    assert (
        "1 of 4 clips were decoded" in sentence
        and f"slow (fps 1, not {SAMPLING['fps']:g})" in sentence
    )


def unlabelled(labels: Mapping[str, str], **changes: Any) -> list[Record]:
    return [*FITTING, dataclasses.replace(clip(7, labels), **changes)]


# A record of another task has a conversation instead of an annotation.
TALK = ({"role": "user", "content": "Who speaks?"},)


@pytest.mark.parametrize(
    ("records", "missing"),
    [
        (unlabelled({"emotion": "sad", "face": "sad"}), "label 'voice', label 'words'"),
        (unlabelled(AGREE | {"emotion": ""}), "label 'emotion'"),
        (unlabelled(AGREE, annotation={}, messages=TALK), "the section speech_content"),
    ],
)
def test_a_clip_that_cannot_be_scored_ends_the_command_before_training(
    built, records, missing, monkeypatch, capsys
):
    folder = built(records).records
    assert _refused(monkeypatch, capsys, str(folder)).endswith(
        f"1 of 4 clips in {folder} lack what scores need: clip7 ({missing}). Add it to "
        "labels.jsonl, or to the annotations, and build the records again. (--help lists all "
        "flags)\n"
    )


def test_a_split_that_is_not_there_and_no_records_are_refused_too(built, monkeypatch, capsys):
    folder = str(built(FITTING, split="val").records)
    assert "No split 'test'" in _refused(monkeypatch, capsys, folder)
    assert "No records in /nowhere" in _refused(monkeypatch, capsys, "/nowhere")


def _refused(monkeypatch, capsys, folder: str) -> str:
    monkeypatch.setattr(ablation.chain, "run", lambda *_: pytest.fail("something was run"))
    monkeypatch.setattr(sys, "argv", ["ablation", "--transfer", folder])
    with pytest.raises(SystemExit, match="2"):
        ablation.main()
    return capsys.readouterr().err


def test_every_arm_has_a_step_of_its_own_that_answers_those_clips(built):
    acted = built(FITTING)
    steps = arms.chain_of(ROOT, 3, list(arms.ARMS), transfer=acted)
    usual = {step.name for step in arms.chain_of(ROOT, 3, list(arms.ARMS))}
    more = [step for step in steps if step.name not in usual]
    assert len(more) == len(arms.ARMS) == len({step.leaves for step in more})
    for name, step in zip(arms.ARMS, more, strict=True):
        flag = dict(zip(step.command[3:], step.command[4:], strict=False))
        assert (flag["--data"], flag["--split"]) == (str(acted.records), "test")
        assert flag["--out"] == str(acted.scores_of(ROOT, name))
        assert flag["--checkpoint"] == str(arms.config_of(ROOT, 3, name).workdir)
        assert "--probes" not in step.command


def test_records_that_change_are_answered_again(built):
    acted = built(FITTING)
    before = acted.scores_of(ROOT, "sed")
    shutil.rmtree(acted.records)
    after = built([clip(9, AGREE), *FITTING]).scores_of(ROOT, "sed")
    assert before != after


def test_scores_of_clips_from_elsewhere_have_a_table_of_their_own(built, tmp_path):
    acted = built(FITTING)
    roots = [tmp_path / "seed_1", tmp_path / "seed_2"]
    for root in roots:
        for name, right in (("sed", 10), ("anchored", 20)):
            answers.answered(arms.scores_of(root, name), answers.CLIPS)
            answers.answered(acted.scores_of(root, name), right, probes=False)
    found = compare.compared(roots, ["sed", "anchored"], acted)
    elsewhere = found["transfer"]
    assert found["arms"]["sed"]["conflicting"]["value"] == 1.0
    assert elsewhere["arms"]["sed"]["conflicting"]["value"] == 0.25
    assert "moved_muted" in found["arms"]["sed"] and "moved_muted" not in elsewhere["arms"]["sed"]
    judged = {claim["says"]: claim for claim in elsewhere["claims"]}
    assert judged[compare.MAIN.says]["gain"]["value"] == pytest.approx(0.25)
    text = compare.table(found)
    assert "Clips from elsewhere, of `acted/records`, split test: 1 agree and 2 conflict." in text
    assert text.count("| `anchored`: ") == 2
