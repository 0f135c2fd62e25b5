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
        ("<tts_pad>", "<tts_pad>"),
        ("</tool_call>", "</tool_call>"),
    ],
)
def test_what_cannot_be_stored_or_means_something_else_is_named(text, named):
    assert named in (texts.fault(text) or "")


@pytest.mark.parametrize("text", ["", "a < b | c > d", "\U0001f600", "<|", "u\u2028v"])
def test_other_texts_are_fine(text):
    assert texts.fault(text) is None


def test_a_text_in_another_encoding_is_named_as_that(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_bytes("\ufeffcalm 平静".encode())
    assert texts.read(path) == "calm 平静"
    path.write_text("calm", encoding="utf-16")
    with pytest.raises(ValueError, match=r"labels\.jsonl is not UTF-8 text"):
        texts.read(path)


def test_only_the_first_few_of_many_clips_are_named():
    assert texts.listed(list("abc")) == "a, b, c"
    assert texts.listed(list("abcdefg")) == "a, b, c, d, e and 2 more"
