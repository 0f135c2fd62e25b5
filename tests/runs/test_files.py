import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from saber_jax.runs import files
from tests import full_disk


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(OSError, match="full"), files.replacing(path) as partial:
        partial.write_text("half of the ne")
        raise OSError("the disk is full")
    assert path.read_text() == "old"
    with files.replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def write_array_record(path):
    with files.replacing(path) as partial:
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        writer.write(b"12345")
        writer.close()


WRITERS = {
    "write_bytes": lambda path: files.write_bytes(path, b"12345"),
    "write_jsonl": lambda path: files.write_jsonl(path, [{"a": 1}]),
    "create": lambda path: files.create(path, "12345"),
    "append": lambda path: files.append(path, b"12345"),
    "an ArrayRecord": write_array_record,
}


@pytest.mark.parametrize("how", WRITERS)
def test_a_file_that_a_full_disk_refused_is_named(how, tmp_path):
    path = tmp_path / "file"
    with (
        full_disk.files_of_at_most(4),
        pytest.raises(OSError, match=rf"File too large: '{path}'"),
    ):
        WRITERS[how](path)


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with files.replacing(tmp_path / "file") as one, files.replacing(tmp_path / "file") as two:
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "file").read_text() == "one"  # The outer block ends last.


def test_a_folder_is_replaced_whole_or_stays_as_it_was(tmp_path):
    out = tmp_path / "out"
    for text, place in (("old", None), ("new", tmp_path / "elsewhere")):
        with files.replacing_folder(out, partial=place) as partial:
            (partial / text).write_text(text)
    assert [p.name for p in out.iterdir()] == ["new"]
    with pytest.raises(RuntimeError), files.replacing_folder(out) as partial:
        (partial / "half").touch()
        raise RuntimeError
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("line", [b'{"a": 1', b"[1]", b"\xff\xfe"])
def test_a_damaged_line_is_named_with_its_file_and_number(tmp_path, line):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"lines\.jsonl:3 is not"):
        files.read_jsonl(path)


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"a\.json is damaged"):
        files.read_json(tmp_path / "a.json")


def test_json_comes_back_as_it_was_written(tmp_path):
    files.write_json(tmp_path / "a.json", {"text": "长", "n": [1, None]})
    assert files.read_json(tmp_path / "a.json") == {"text": "长", "n": [1, None]}
    files.write_jsonl(tmp_path / "a.jsonl", [{"text": "长"}, {}])
    assert files.read_jsonl(tmp_path / "a.jsonl") == [{"text": "长"}, {}]


def test_a_key_that_json_has_twice_is_refused_and_not_halved(tmp_path):
    assert files.parse_json(b'{"a": [{"b": 1}, {"b": 2}]}') == {"a": [{"b": 1}, {"b": 2}]}
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a": 1}\n{"a": {"b": 1, "b": 2}}\n')
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2 is not JSON \(it has 'b' twice\)"):
        files.read_jsonl(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="too many lists"):
        files.read_json(path)
