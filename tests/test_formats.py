"""The examples of docs/formats.md are read by the code that they are about."""

import json
import re
from pathlib import Path

import pytest

from data_prep.records import clips
from data_prep.records.containers import EXTENSIONS
from data_prep.records.conversations import FORMATS
from saber_jax.data.annotations import parse_annotation
from saber_jax.data.pairs import read_pairs
from saber_jax.data.records import FIELDS, LABELS
from saber_jax.data.withhold import MODALITIES

DOC = (Path(__file__).parents[1] / "docs/formats.md").read_text(encoding="utf-8")


def examples(name: str) -> list[str]:
    found = re.findall(rf"^```jsonl? {re.escape(name)}\n(.*?)^```$", DOC, re.DOTALL | re.MULTILINE)
    assert found, name
    return found


def test_both_forms_of_the_saber_json_are_read():
    nested, flat = (parse_annotation(json.loads(text)) for text in examples("annotation"))
    assert tuple(nested) == tuple(flat) == FIELDS
    assert all(f"`{field}`" in DOC for field in FIELDS)
    assert [clips.detect_language(one) for one in (nested, flat)] == ["en", "zh"]


def test_the_labels_are_read_and_every_key_is_described(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text(examples("labels")[0], encoding="utf-8")
    labels = clips.read_labels(path)
    assert labels["B/001"]["kappa"] == "1.0" and set(LABELS) <= set(labels["B/001"])
    assert all(f"`{key}`" in DOC for key in (*LABELS, "split", "language"))


def test_the_pairs_are_read(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(examples("pairs")[0], encoding="utf-8")
    plain, withheld = read_pairs(tmp_path)
    assert plain.withheld == "" and withheld.kappa == 0.8
    assert all(f"`{modality}`" in DOC for modality in MODALITIES)


@pytest.mark.parametrize("name", FORMATS)
def test_the_rows_are_read(name):
    rows = [FORMATS[name](json.loads(line)) for line in examples(name)[0].splitlines()]
    assert rows and all(row.answer and row.rejected for row in rows)


def test_every_suffix_is_listed():
    listed = re.search(r"Videos may be (.*?)\. They", DOC, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"\w+", listed[1])) - {"or"} == {s[1:] for s in EXTENSIONS}
