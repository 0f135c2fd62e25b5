import pytest

from saber_jax.data import speech


def test_word_errors_ignore_case_marks_and_sound_events():
    # One substitution and one deletion in four words.
    reference, said = "Don't <laughter> stop, please now!", "dont stop pleas"
    assert speech.errors(reference, said, "en") == (2, 4)


def test_chinese_is_counted_in_characters():
    assert speech.errors("我很好。", "我 很坏", "zh") == (1, 3)


@pytest.mark.parametrize(
    ("reference", "said", "expected"),
    [("", "two words", (2, 0)), ("one", "", (1, 1)), ("", "", (0, 0)), ("a b", "b a c", (2, 2))],
)
def test_silence_and_insertions_count(reference, said, expected):
    assert speech.errors(reference, said, "en") == expected
