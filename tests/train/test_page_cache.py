"""Files that pass through once come out as they went in."""

import numpy as np
import pytest

from saber_jax.train import page_cache


def test_what_is_written_in_parts_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(page_cache, "EVERY", 1000)  # So that settling happens in between.
    parts = [np.arange(n, dtype=np.float32) for n in (3, 0, 700, 5, 400)]
    page_cache.write(tmp_path / "f", [b"start", *parts])
    want = b"start" + b"".join(part.tobytes() for part in parts)
    assert (tmp_path / "f").read_bytes() == want
    assert page_cache.read(tmp_path / "f", len(want) - 5, 5).tobytes() == want[5:]


def test_a_file_that_shrank_is_an_error_and_not_zeros(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    with pytest.raises(EOFError, match="ends 3 bytes before it should"):
        page_cache.read(tmp_path / "f", 6, 2)


def test_files_are_dropped_as_often_as_their_bytes_are_reported(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/f").write_bytes(b"12345")
    drops = []
    monkeypatch.setattr(page_cache, "EVERY", 10)
    monkeypatch.setattr(page_cache, "_drop", lambda *arguments: drops.append(arguments))
    pages = page_cache.PageDropper(tmp_path)
    for _ in range(7):
        pages.report(4)
    assert len(drops) == 2
