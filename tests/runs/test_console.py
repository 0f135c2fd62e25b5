"""What a long job says: once, and without Orbax's tracebacks beside the error that it raises."""

import logging
import sys
from types import SimpleNamespace

import orbax.checkpoint as ocp
import pytest

from saber_jax.runs import console


def test_a_missing_checkpoint_is_one_error_and_no_logged_traceback(tmp_path, caplog):
    console.quiet_orbax()
    console.quiet_orbax()
    with ocp.StandardCheckpointer() as checkpointer, pytest.raises(FileNotFoundError):
        checkpointer.restore(tmp_path / "none")
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []


def test_what_others_log_is_kept(caplog):
    console.quiet_orbax()
    logging.getLogger("absl").error("a message of this project")
    assert [r.getMessage() for r in caplog.records] == ["a message of this project"]


def test_only_the_closed_loop_of_a_failed_save_is_no_exception_to_show(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda shows: shown.append(str(shows.exc_value)))
    console.quiet_orbax()
    console.quiet_orbax()
    for text in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert shown == ["another"]
