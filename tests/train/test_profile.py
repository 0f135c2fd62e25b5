"""The trace of a run that does not start at its first step, or does not reach its last."""

import jax
import numpy as np
import pytest

from saber_jax.train.nonfinite import RolledBack
from saber_jax.train.profile import Profile
from tests.train.test_loop import STEPS, go


def traced(folder):
    """The steps of the newest trace in `folder`."""
    *_, trace = sorted((folder / "profile").rglob("*.xplane.pb"))
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    return sorted({dict(e.stats)["step_num"] for e in events if e.name == "train"})


def test_a_run_that_resumes_inside_the_window_traces_the_rest_of_it(tmp_path):
    with pytest.raises(FloatingPointError):
        go(tmp_path, [1.0, 1.0, np.nan, 1.0, 1.0, 1.0])
    go(tmp_path, [1.0] * STEPS, window="1:4")  # From step 2.
    assert traced(tmp_path) == [2, 3]
    assert (tmp_path / "profile" / "memory.prof").exists()


def test_a_run_that_resumes_after_the_window_traces_nothing(tmp_path):
    with pytest.raises(FloatingPointError):
        go(tmp_path, [1.0, 1.0, 1.0, 1.0, np.nan, 1.0])
    go(tmp_path, [1.0] * STEPS, window="1:3")
    assert not (tmp_path / "profile").exists()


def test_a_rollback_into_the_window_traces_it_again(tmp_path):
    batches = [1.0, 1.0, 1.0, np.nan, 1.0, 1.0]
    with pytest.raises(RolledBack):
        go(tmp_path, batches, window="1:5", policy="rollback")
    go(tmp_path, [1.0] * STEPS, window="1:5")  # From step 2.
    assert traced(tmp_path) == [2, 3, 4]


def test_a_trace_that_is_cut_short_in_a_bucket_leaves_nothing(tmp_path, monkeypatch):
    local = tmp_path / "local"
    monkeypatch.setattr("saber_jax.train.profile.buckets.mounted", lambda _: True)
    monkeypatch.setattr("saber_jax.train.profile.tempfile.mkdtemp", lambda **_: str(local))
    profile = Profile("1:3", tmp_path, steps=STEPS)
    with profile.step(1):
        pass
    profile.close()
    profile.close()
    assert list(tmp_path.iterdir()) == []
