import pytest

from saber_jax.runs import manifest
from saber_jax.runs.manifest import fingerprint

SAYS = {"what": "DIR belongs to another job", "remedy": "Choose another."}


def test_what_differs_is_listed_by_dotted_name_and_nothing_else():
    there = {"data": {"length": 4096, "path": "a"}, "old": None, "same": [1]}
    here = {"data": {"length": 2048, "path": "a"}, "new": 1, "same": [1]}
    assert manifest.differences(there, here) == [
        "data.length: 4096 there, 2048 here",
        "new: nothing there, 1 here",
        "old: None there, nothing here",
    ]


def test_a_folder_is_claimed_once_and_joined_by_equal_inputs_alone(tmp_path):
    path = tmp_path / "new" / "manifest.json"
    for _ in range(2):
        manifest.claim(path, {"model": "a"}, **SAYS)
    with pytest.raises(
        manifest.OtherInputsError,
        match=r"DIR belongs to another job \(model: a there, b here\)\. Choose another\.",
    ):
        manifest.claim(path, {"model": "b"}, **SAYS)


def test_a_damaged_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        manifest.claim(tmp_path / "manifest.json", {}, **SAYS)


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
