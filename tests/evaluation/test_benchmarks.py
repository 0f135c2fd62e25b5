import dataclasses
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
    rows = saber.made_elsewhere(answers, tmp_path, "test")
    assert [row["labels"] for row in rows] == [dict(synthetic.record(i).labels) for i in (0, 1)]


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data of all benchmarks: clips a, b and c."""
    folder = tmp_path_factory.mktemp("data")
    records = [dataclasses.replace(synthetic.record(i), clip_id="abc"[i]) for i in range(3)]
    dataset.write(folder / "saber_test", {"test": range(3)}, records.__getitem__)
    (folder / "emer").mkdir()
    (folder / "emer/gt-eng.csv").write_text("names,eng_reasons\na,x\nb,y\nc,z\n")
    (folder / "emobench_m").mkdir()
    items = [{"video": f"videos/{c}.mp4", "clip_id": c, "expected_value": "joy"} for c in "abc"]
    (folder / "emobench_m/MELD.json").write_text(json.dumps(items))
    return folder


@pytest.mark.parametrize("name", BENCHMARKS)
def test_clips_of_the_data_without_an_answer_are_empty_answers_and_marked(name, folder, tmp_path):
    said = [{"clip_id": c, "response": "So joy.", "task": "MELD"} for c in "ca"]
    rows = BENCHMARKS[name].made_elsewhere(
        _write(tmp_path / "answers.jsonl", said), folder / name, "test"
    )
    answers = {row["clip_id"]: row["response"] for row in rows}
    assert answers == {"a": "So joy.", "b": "", "c": "So joy."}
    assert [row["clip_id"] for row in rows if row.get("unanswered")] == ["b"]
    assert BENCHMARKS[name].score(rows, None)["n"] == 3


@pytest.mark.parametrize("name", BENCHMARKS)
def test_answers_to_clips_that_the_data_lacks_are_refused_even_with_a_truth(name, folder, tmp_path):
    said = [{"clip_id": c, "response": "So joy."} | TRUTHS[name] for c in "axbyc"]
    with pytest.raises(ValueError, match=r"2 of 5 answers .*: .*x, .*y\. Check --data and --split"):
        BENCHMARKS[name].made_elsewhere(
            _write(tmp_path / "answers.jsonl", said), folder / name, "test"
        )


def test_tasks_without_any_result_are_missing_and_not_unanswered(folder, tmp_path):
    for task in ("MELD", "MOSI"):
        items = (folder / "emobench_m/MELD.json").read_text()
        (tmp_path / f"{task}.json").write_text(items.replace("videos/", f"{task}/"))
    emobench = BENCHMARKS["emobench_m"]
    results = tmp_path / "results"
    results.mkdir()
    official = [{"video": f"/p/{c}.mp4", "predicted_value": "joy"} for c in "abc"]
    (results / "MELD.json").write_text(json.dumps(official))
    rows = emobench.made_elsewhere(results, tmp_path, "test")
    assert [(row["task"], row["expected_value"]) for row in rows] == [("MELD", "joy")] * 3
    assert not any("unanswered" in row for row in rows)
    assert "MOSI: no predictions for it" in emobench.score(rows, None)["missing"]
