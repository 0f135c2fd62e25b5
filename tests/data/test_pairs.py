import json

import pytest

from saber_jax.data.pairs import read_pairs, write_pairs
from saber_jax.runs import checksums

GOOD = {"clip_id": "a", "chosen": "calm", "rejected": "angry"}


def written(tmp_path, *lines):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_pairs_are_read_with_what_is_known_of_them_and_other_keys_are_for_people(tmp_path):
    known = GOOD | {"withheld": "audio", "kappa": 0.5, "language": "zh"}
    written(tmp_path, json.dumps(GOOD), json.dumps(known))
    plain, full = read_pairs(tmp_path)
    assert (plain.withheld, plain.kappa) == ("", None)
    assert (full.withheld, full.kappa) == ("audio", 0.5)
    assert plain.key == full.key


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    line = json.dumps(GOOD | {"chosen": "b\u2028c\x85d"}, ensure_ascii=False)
    assert read_pairs(written(tmp_path, line))[0].chosen == "b\u2028c\x85d"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"clip_id": "a", ', "is not JSON"),
        ("[]", "not a JSON object"),
        (json.dumps({"clip_id": "a", "chosen": "calm"}), r"lacks \['rejected'\]"),
        (json.dumps(GOOD | {"chosen": None}), "chosen is None; it must be text"),
        (json.dumps(GOOD | {"withheld": "smell"}), "withheld is 'smell'"),
        (json.dumps(GOOD | {"kappa": 2}), "kappa is 2; it must be a number from 0 to 1"),
        (json.dumps(GOOD | {"kappa": "much"}), "kappa is 'much'"),
        (json.dumps(GOOD | {"rejected": "calm"}), "the same text"),
        (json.dumps(GOOD | {"rejected": " "}), "rejected is empty"),
        (json.dumps(GOOD | {"chosen": "a <|im_end|>"}), "chosen holds <.im_end.>"),
        (json.dumps(GOOD | {"chosen": "half \ud83d"}), "half of a character"),
    ],
)
def test_a_damaged_pair_is_named_with_its_file_and_line(tmp_path, line, words):
    with pytest.raises(ValueError, match=rf"pairs\.jsonl:2\b.*{words}"):
        read_pairs(written(tmp_path, json.dumps(GOOD), line))


def test_a_changed_bit_is_named_with_its_line_also_where_the_pair_stays_valid(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [GOOD, GOOD | {"clip_id": "b"}])
    assert [pair.clip_id for pair in read_pairs(path)] == ["a", "b"]
    path.write_text(path.read_text().replace("angry", "angrx").replace("angrx", "angry", 1))
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2 is damaged.*delete pairs\.jsonl\.crc32"):
        read_pairs(path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2 is damaged"):
        read_pairs(path)


def test_pairs_without_checksums_are_read_with_one_line_said(tmp_path, capsys):
    read_pairs(written(tmp_path, json.dumps(GOOD)))
    assert capsys.readouterr().err.count("\n") == 1
    write_pairs(tmp_path / "pairs.jsonl", [GOOD])
    read_pairs(tmp_path)
    assert not capsys.readouterr().err


def test_a_write_that_is_killed_leaves_no_false_checksums(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [GOOD])
    with pytest.raises(RuntimeError), checksums.written(path):
        path.write_text(json.dumps(GOOD | {"clip_id": "b"}) + "\n")
        raise RuntimeError("killed")
    assert read_pairs(path)[0].clip_id == "b"


def test_no_pairs_is_an_error_that_says_how_to_mine_some(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_prep\.preferences"):
        read_pairs(tmp_path)
    with pytest.raises(ValueError, match="holds no pair"):
        read_pairs(written(tmp_path))
