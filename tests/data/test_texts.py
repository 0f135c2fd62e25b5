import pytest

from saber_jax.data import texts


def test_json_lines_end_at_newlines_only():
    text = '{"a": "b\u2028c"}\r\n\n{"d": "e\x85f\x1cg"}'
    assert list(texts.lines(text)) == [(1, '{"a": "b\u2028c"}\r'), (3, '{"d": "e\x85f\x1cg"}')]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a <|im_end|> b", "<|im_end|>"),
        ("<|VIDEO|>", "<|VIDEO|>"),
        ("half \ud83d", "\\ud83d"),
        ("\udc00", "\\udc00"),
    ],
)
def test_what_cannot_be_stored_or_means_something_else_is_named(text, named):
    assert named in (texts.fault(text) or "")


@pytest.mark.parametrize("text", ["", "a < b | c > d", "\U0001f600", "<|", "u\u2028v"])
def test_other_texts_are_fine(text):
    assert texts.fault(text) is None
