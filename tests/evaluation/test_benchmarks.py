import json

import pytest

from data_prep.records import dataset
from saber_jax.data.records import FIELDS, RecordSource
from saber_jax.evaluation.benchmarks import BENCHMARKS
from tests import synthetic


def test_what_needs_only_words_of_records_reads_no_pixels(tmp_path, monkeypatch):
    dataset.write(tmp_path, {"test": [0, 1]}, synthetic.record)
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"clip_id": "clip1", "response": "Emotion: sad"}) + "\n")
    monkeypatch.delattr(RecordSource, "__getitem__")
    saber = BENCHMARKS["saber_test"]
    assert len(saber.clips(tmp_path, "test", None).records) == 2
    [row] = saber.made_elsewhere(answers, tmp_path, "test")
    assert row["labels"] == dict(synthetic.record(1).labels)


def _write(path, rows):
    # The blank line: places are lines of the file, not numbers of answers.
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    return path


SABER_TRUTH = {"labels": {"emotion": "sad"}, "annotation": dict.fromkeys(FIELDS, "x")}
TRUTHS = {
    "saber_test": SABER_TRUTH | {"language": "en"},
    "emer": {"reason": "He weeps."},
    "emobench_m": {"task": "MELD", "expected_value": "joy"},
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_clip_that_is_answered_twice_is_refused_by_its_places(name, tmp_path):
    rows = [{"clip_id": c, "response": "So joy."} | TRUTHS[name] for c in ("a", "b", "a")]
    read = BENCHMARKS[name].made_elsewhere
    assert len(read(_write(tmp_path / "once.jsonl", rows[:2]), None, "test")) == 2
    places = (
        r"twice\.jsonl, entry 1, .*, entry 3" if name == "emobench_m" else "twice.jsonl:1, .*:5"
    )
    with pytest.raises(ValueError, match=rf"a \(.*{places}\)"):
        read(_write(tmp_path / "twice.jsonl", rows), None, "test")


def test_official_results_of_one_clip_twice_are_refused_and_those_without_names_are_not(tmp_path):
    read = BENCHMARKS["emobench_m"].made_elsewhere
    nameless = {"task": "SIMS", "expected_value": "positive", "predicted_value": "neutral"}
    # Two clips of one file name, in two folders, and one name in two tasks.
    clips = [{"video": "a/1.mp4"}, {"video": "b/1.mp4"}, {"video": "a/1.mp4", "task": "MOSI"}]
    rows = [nameless, nameless, *(nameless | clip for clip in clips)]
    assert len(read(_write(tmp_path / "once.jsonl", rows), None, "test")) == 5
    with pytest.raises(ValueError, match=r"SIMS a/1\.mp4"):
        read(_write(tmp_path / "twice.jsonl", [*rows, rows[2]]), None, "test")


def test_an_emer_line_without_a_response_is_no_empty_answer(tmp_path):
    (tmp_path / "gt-eng.csv").write_text("names,eng_reasons\na,She beams.\n")
    answers = _write(tmp_path / "answers.jsonl", [{"clip_id": "a", "answer": "happy"}])
    with pytest.raises(ValueError, match=r"answers\.jsonl:1 lacks response"):
        BENCHMARKS["emer"].made_elsewhere(answers, tmp_path, "test")
