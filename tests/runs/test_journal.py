import pytest

from saber_jax.runs.journal import Journal, batches, fingerprint

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
    with pytest.raises(ValueError, match="model: 'a', now 'b'"):
        Journal(tmp_path, "lines.jsonl", INPUTS | {"model": "b"})


def test_results_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / "lines.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        Journal(tmp_path, "lines.jsonl", INPUTS)


def test_batches():
    assert batches(5, 2, first=1) == [(1, 3), (3, 5), (5, 6)]
    assert batches(0, 2) == []


def test_a_fingerprint_sees_contents_names_and_nothing_else(tmp_path):
    for name in ("one", "two"):
        folder = tmp_path / name / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"x" * (3 << 20))
        (folder / "cache").write_text(name)
    one, two = (fingerprint(tmp_path / name, "**/data") for name in ("one", "two"))
    assert one == two
    with (tmp_path / "two/checkpoints/data").open("r+b") as f:
        f.seek(-1, 2)
        f.write(b"y")
    assert fingerprint(tmp_path / "two", "**/data") != one
    (tmp_path / "one/checkpoints/data").rename(tmp_path / "one/data")
    assert fingerprint(tmp_path / "one", "**/data") != one


def test_a_fingerprint_of_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="weights"):
        fingerprint(tmp_path, "weights*")
