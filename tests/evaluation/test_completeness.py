import pytest

from saber_jax.evaluation import completeness


def test_a_clip_with_two_answers_is_named_with_the_places_of_both():
    completeness.check_once([("a", "f:1"), ("b", "f:2")])
    with pytest.raises(ValueError, match=r"count: a \(f:1, f:3\)\. Keep one"):
        completeness.check_once([("a", "f:1"), ("b", "f:2"), ("a", "f:3")])


def test_only_the_first_few_of_many_clips_are_named():
    assert completeness.named(list("abc")) == "a, b, c"
    assert completeness.named(list("abcdefg")) == "a, b, c, d, e and 2 more"
