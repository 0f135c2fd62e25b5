"""Requests, their targets, and the draw of a task for every example."""

import dataclasses
import re

import numpy as np
import pytest

from saber_jax.data import sed
from saber_jax.data.examples import Response, encode_record, measure_record, size_of
from saber_jax.data.records import FIELDS, LANGUAGES
from saber_jax.data.tasks import TASKS, WORDINGS, Mixture, Request, conversation
from tests import synthetic

REQUESTS = [Request(task=task, wording=w) for task in TASKS for w in range(WORDINGS)]


def test_the_default_request_is_the_six_section_prompt():
    record = synthetic.record(0)
    prompt, target = conversation(record, "sed")
    assert prompt == sed.prompt_text("en", True, True)
    assert target == sed.target_text(record.annotation)


@pytest.mark.parametrize("task", TASKS)
def test_a_target_holds_its_sections_alone_with_evidence_before_reasoning(task):
    _, target = conversation(synthetic.record(0), task)
    headings = re.findall(r"\[(\w+)\]", target)
    assert tuple(headings) == TASKS[task]
    assert headings == sorted(headings, key=FIELDS.index)


@pytest.mark.parametrize("task", ["sed", "acoustic", "facial_exp_desc"])
def test_an_answer_beside_an_annotation_is_that_to_the_six_section_request(tokenizer, task):
    plain = synthetic.record(0)
    answered = dataclasses.replace(plain, answer="[sentiment_analysis] Emotion: happy")
    request = Request(task=task)
    targets = [measure_record(r, tokenizer, request=request)[1] for r in (plain, answered)]
    assert np.array_equal(*targets) == (task != "sed")


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_requests_are_worded_alike(language):
    words = [request.instruction(language) for request in REQUESTS]
    assert len(set(words)) == len(words)
    chinese = [bool(re.search("[\u4e00-\u9fff]", text)) for text in words]
    assert all(chinese) if language == "zh" else not any(chinese)


def test_the_end_of_a_part_belongs_to_its_last_section(tokenizer):
    _, target = conversation(synthetic.record(0), "acoustic")
    assert set(Response.encode(tokenizer, target).sections.tolist()) == {4, 5}
    assert Response.encode(tokenizer, target).sections[-1] == 5


def test_tasks_are_drawn_by_weight_anew_every_epoch_and_the_same_every_time():
    mixture = Mixture({"visual": 1.0, "sed": 3.0, "acoustic": 0.0}, wordings=2, seed=5)
    assert {request.task for request in mixture.requests} == {"sed", "visual"}
    first, second = mixture.draw(0, 4000), mixture.draw(1, 4000)
    share = np.mean([mixture.requests[k].task == "sed" for k in first])
    assert share == pytest.approx(0.75, abs=0.03)
    assert np.bincount(first, minlength=4).min() > 400
    assert (first != second).mean() > 0.3
    reordered = Mixture({"sed": 3.0, "visual": 1.0}, wordings=2, seed=5)
    np.testing.assert_array_equal(reordered.draw(0, 4000), first)


@pytest.mark.parametrize(
    ("weights", "wordings", "message"),
    [
        ({"voice": 1.0}, 1, "no task 'voice'"),
        ({"video": 1.0}, 1, "did you mean 'video_desc'"),
        ({"sed": 0.0}, 1, "positive"),
        ({"sed": 2.0, "visual": -1.0}, 1, "positive"),
        ({}, 1, "positive"),
        ({"sed": 1.0}, 5, "1 to 4"),
    ],
)
def test_impossible_mixtures_are_refused(weights, wordings, message):
    with pytest.raises(ValueError, match=message):
        Mixture(weights, wordings=wordings)


def test_a_curriculum_draws_other_tasks_in_its_first_epochs():
    mixture = Mixture(
        {"sed": 3.0, "speech_content": 1.0},
        first_weights={"facial_exp_desc": 1.0, "sed": 0.0},
        first_epochs=2,
    )

    def drawn(epoch: int) -> set[str]:
        return {mixture.requests[k].task for k in mixture.draw(epoch, 500)}

    assert drawn(0) == drawn(1) == {"facial_exp_desc"}
    assert drawn(2) == drawn(9) == {"sed", "speech_content"}


def test_a_curriculum_without_a_task_is_refused():
    with pytest.raises(ValueError, match="positive"):
        Mixture({"sed": 1.0}, first_weights={"sed": 0.0}, first_epochs=1)


@pytest.mark.parametrize(
    ("task", "pictures", "sound"),
    [
        ("facial_exp_desc", True, False),
        ("visual", True, False),
        ("speech_content", False, True),
        ("acoustic", False, True),
        ("sentiment_analysis", True, True),
        ("sed", True, True),
    ],
)
def test_a_task_alone_shows_the_modality_that_holds_its_answer(tokenizer, task, pictures, sound):
    record = synthetic.record(0)
    alone, whole = (Request(task=task, alone=alone) for alone in (True, False))
    example = encode_record(record, tokenizer, request=alone)
    assert (len(example.patches) > 0, len(example.mel) > 0) == (pictures, sound)
    assert size_of(example) == measure_record(record, tokenizer, request=alone)[0]
    both = encode_record(record, tokenizer, request=whole)
    assert len(both.patches) and len(both.mel)
    assert (size_of(example).text < size_of(both).text) == (not (pictures and sound))
