import pytest

from saber_jax.runs.journal import Journal, batches

INPUTS = {"model": "a", "split": "test"}


def test_a_journal_goes_on_at_a_batch_boundary_after_a_kill_in_the_middle_of_a_line(tmp_path):
    journal = Journal(tmp_path, "lines.jsonl", INPUTS)
    journal.append([{"i": 0}, {"i": 1}])
    journal.append([{"i": 2, "text": "长"}])
    with journal.path.open("ab") as f:
        f.write(b'{"i": 3')
    again = Journal(tmp_path, "lines.jsonl", INPUTS)
    assert again.resume([2, 4]) == [{"i": 0}, {"i": 1}]
    again.append([{"i": 9}])
    assert again.resume([3]) == [{"i": 0}, {"i": 1}, {"i": 9}]


def test_other_inputs_are_refused_and_named(tmp_path):
    Journal(tmp_path, "lines.jsonl", INPUTS)
    with pytest.raises(ValueError, match="model: a there, b here"):
        Journal(tmp_path, "lines.jsonl", INPUTS | {"model": "b"})


def test_results_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / "lines.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        Journal(tmp_path, "lines.jsonl", INPUTS)


def test_batches():
    assert batches(5, 2, first=1) == [(1, 3), (3, 5), (5, 6)]
    assert batches(0, 2) == []
