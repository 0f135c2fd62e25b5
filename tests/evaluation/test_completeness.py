from pathlib import Path

import pytest

from saber_jax.evaluation import completeness


def test_a_clip_with_two_answers_is_named_with_the_places_of_both():
    completeness.check_once([("a", "f:1"), ("b", "f:2")])
    with pytest.raises(ValueError, match=r"count: a \(f:1, f:3\)\. Keep one"):
        completeness.check_once([("a", "f:1"), ("b", "f:2"), ("a", "f:3")])


def test_clips_come_in_the_order_of_the_data_and_those_without_an_answer_are_marked():
    answers = {clip: {"clip_id": clip, "response": "x"} for clip in "ca"}
    rows = completeness.completed(answers, ["a", "b", "c"], Path("data"))
    assert rows == [
        answers["a"],
        {"clip_id": "b", "response": "", "unanswered": True},
        answers["c"],
    ]


def test_answers_that_fit_no_clip_or_two_are_refused():
    with pytest.raises(ValueError, match="1 of 2 answers are for clips that are not in data: x"):
        completeness.completed({"x": {}, "a": {}}, ["a", "b"], Path("data"))
    with pytest.raises(ValueError, match=r"data has these clips more than once.*: b\."):
        completeness.completed({"a": {}}, ["a", "b", "b"], Path("data"))
