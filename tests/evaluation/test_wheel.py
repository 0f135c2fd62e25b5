import json
from pathlib import Path

import pytest

from saber_jax.evaluation import wheel

OFFICIAL = json.loads((Path(__file__).parent / "official/emotion_wheel.json").read_text())


def test_scores_equal_the_official_ones():
    truth, said = (
        {str(i): wheel.parse_words(clip[side]) for i, clip in enumerate(OFFICIAL["clips"])}
        for side in (0, 1)
    )
    scores = wheel.score(truth, said)
    for level, golden in OFFICIAL["golden"].items():
        got = scores[level]
        assert got["value"] == pytest.approx(golden["f"], abs=1e-12)
        assert got["precision"] == pytest.approx(golden["precision"], abs=1e-12)
        assert got["recall"] == pytest.approx(golden["recall"], abs=1e-12)
    both = [golden["f"] for golden in OFFICIAL["golden"].values()]
    assert scores["mean"]["value"] == pytest.approx(sum(both) / 2, abs=1e-12)
    assert scores["mean"]["interval"][0] < scores["mean"]["value"] < scores["mean"]["interval"][1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[happy, sad]", ["happy", "sad"]),
        ("['Happy', \"very sad\"]", ["happy", "very sad"]),
        ("happy", ["happy"]),
        ("don't care", ["don", "t care"]),
        ("[[a], b]]", ["[a]", "b]"]),
        ("", []),
        ("[]", []),
        (" , ,", []),
    ],
)
def test_lists_are_read_as_language_models_write_them(text, words):
    assert wheel.parse_words(text) == words


def test_the_tables_are_whole():
    assert len(wheel._forms()) == 7386
    assert len(wheel._meanings()) == 1255


def test_forms_and_synonyms_fall_into_one_group_and_unknown_words_into_none():
    level = ("wheel1", "level1")
    assert wheel.groups(["joyful", "joyfully", "joyfulness"], *level) == wheel.groups(
        ["joy"], *level
    )
    assert wheel.groups(["xyzzy", "happy"], *level) == wheel.groups(["happy"], *level)
    assert wheel.groups(["xyzzy"], *level) == set()


def test_an_innermost_word_goes_to_its_first_child_at_the_second_level():
    members = wheel._members("wheel1", "level2")
    assert members["mad"] == "aggressive"
    assert members["hostile"] == "aggressive"
    assert wheel._members("wheel1", "level1")["hostile"] == "mad"


def test_no_word_said_scores_0_and_no_word_in_the_truth_is_not_counted():
    scores = wheel.score({"a": ["happy"], "b": ["happy"]}, {"a": ["happy"], "b": []})
    assert scores["level1"]["precision"] == scores["level1"]["recall"] == 0.5
    scores = wheel.score({"a": ["happy"], "b": []}, {"a": ["happy"], "b": ["sad"]})
    assert scores["level1"]["value"] == 1.0


def test_nothing_in_common_is_0_and_not_a_division_by_zero():
    scores = wheel.score({"a": ["happy"]}, {"a": ["sad"]})
    assert scores["mean"]["value"] == 0.0


def test_truth_and_answers_for_different_clips_are_refused():
    with pytest.raises(ValueError, match="differ in 2 clips"):
        wheel.score({"a": ["happy"]}, {"b": ["happy"]})
