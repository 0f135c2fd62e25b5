import json

from data_prep.records import dataset
from saber_jax.data.records import RecordSource
from saber_jax.evaluation import benchmarks
from tests import synthetic


def test_what_needs_only_words_of_records_reads_no_pixels(tmp_path, monkeypatch):
    dataset.write(tmp_path, {"test": [0, 1]}, synthetic.record)
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"clip_id": "clip1", "response": "Emotion: sad"}) + "\n")
    monkeypatch.delattr(RecordSource, "__getitem__")
    saber = benchmarks.BENCHMARKS["saber_test"]
    assert len(saber.clips(tmp_path, "test", None).records) == 2
    [row] = saber.made_elsewhere(answers, tmp_path, "test")
    assert row["labels"] == dict(synthetic.record(1).labels)
