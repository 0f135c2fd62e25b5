"""Checkpoints go into a mounted bucket around its mount, and survive what a bucket does."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from saber_jax.runs import buckets, files, objects
from saber_jax.train import saved
from tests.bucket import bucket

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 120

RUN = """
import json, sys
from pathlib import Path
from tests.train.test_saved import state
from saber_jax.train.checkpoint import Checkpoints

workdir, steps = Path(sys.argv[1]), json.loads(sys.argv[2])
checkpoints = Checkpoints(workdir, every=2)
found = checkpoints.restore(state(0), {"plan": "abc"})
print("found", found if found is None else int(found.step), flush=True)
if found is not None:
    assert (found.trainable["text/w"] == state(int(found.step)).trainable["text/w"]).all()
for step in steps:
    print("saving", step, flush=True)
    checkpoints.save(state(step), {"step": step, "plan": "abc"})
checkpoints.close()
print("done", flush=True)
"""


def start(made, *steps):
    environ = os.environ | made.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(made.mount / "7b/sft")]
    return subprocess.Popen(
        [*command, json.dumps(steps)],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process):
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    return said


def test_only_paths_below_a_mount_are_the_bucket_s_own(tmp_path, monkeypatch):
    monkeypatch.setenv(buckets.MOUNTS, f"{tmp_path}/my b=gs://b\n/runs=gs://other\n")
    assert str(buckets.native(tmp_path / "my b/7b/x")) == "gs://b/7b/x"
    assert str(buckets.native("/runs")) == "gs://other"
    assert str(buckets.native("gs://third/7b")) == "gs://third/7b"
    assert str(buckets.native("/runs2/x")) == "/runs2/x" and not buckets.mounted("/runs2/x")
    assert buckets.mounted(tmp_path / "my b/7b")
    monkeypatch.delenv(buckets.MOUNTS)
    assert str(buckets.native("/runs/x")) == "/runs/x"


@pytest.mark.slow
def test_steps_are_saved_and_restored_through_a_network_that_fails_and_is_slow():
    with bucket("runs") as made:
        made.unavailable, made.latency = 37, 0.003
        assert "found None" in finished(start(made, 2, 4))
        said = finished(start(made, 6))
        assert "found 4" in said and "damaged" not in said
        assert made.refused > 3
        folder = made.mount / "7b/sft/checkpoints"
        there = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
        assert there == {"4", "6"}
        # Written into the bucket itself, not renamed through the mount.
        assert (folder / "6" / buckets.COMMITTED).exists()


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_costs_that_step_alone(monkeypatch):
    with bucket("runs") as made:
        finished(start(made, 2))
        made.stuck.set()
        killed = start(made, 4)
        while "saving 4" not in (line := killed.stdout.readline()):
            assert line, "it ended by itself"
        before, deadline = made.requests, time.monotonic() + PATIENCE
        while made.requests < before + 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        killed.kill()
        killed.wait()
        made.stuck.clear()
        said = finished(start(made, 6))
        assert "found 2" in said
        monkeypatch.setenv(buckets.MOUNTS, made.environ[buckets.MOUNTS])
        assert saved.newest(made.mount / "7b/sft").name == "6"


def test_a_step_whose_end_nobody_wrote_is_not_taken_for_whole(monkeypatch):
    with bucket("runs") as made:
        finished(start(made, 2))
        monkeypatch.setenv(buckets.MOUNTS, made.environ[buckets.MOUNTS])
        step = saved.newest(made.mount / "7b/sft")
        (step / "params" / buckets.COMMITTED).unlink()
        with pytest.raises(saved.DamagedError, match=r"params/commit_success.txt missing"):
            saved.newest(made.mount / "7b/sft")


def test_what_a_killed_save_left_in_a_bucket_is_not_read_and_removed_by_the_next_run(
    tmp_path, monkeypatch
):
    with bucket("runs") as made:
        finished(start(made, 2, 4))
        for variable, value in made.environ.items():
            monkeypatch.setenv(variable, value)
        workdir = made.mount / "7b/sft"
        folder = workdir / "checkpoints"
        # Of imported weights, which have no commit of the whole step; and a step set aside.
        for source, target in (
            ("2/params", "0/params"),
            ("2/digests", "0/digests"),
            ("4", "9.bad"),
        ):
            copied = shutil.copytree(folder / source, tmp_path / target)
            objects.upload_folder(folder / target, copied)
        files.remove(folder / "4" / buckets.COMMITTED)  # It is written last.
        files.remove(folder / "9.bad" / buckets.COMMITTED)
        files.write_text(folder / "6/params/_sharding", "{}")
        assert saved.newest(workdir).name == "2"
        assert "found 2" in finished(start(made))
        assert {path.name for path in files.listed(folder)} == {"0", "2", "9.bad"}
        assert not saved.unfinished(folder / "0")


CACHED = """
import collections, jax, jax.numpy as jnp
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((64, 64)))
print("hits", events["/jax/compilation_cache/cache_hits"])
"""


@pytest.mark.slow
def test_jax_keeps_what_it_compiled_in_the_bucket_itself():
    with bucket("runs") as made:
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": "gs://runs/7b/compilation_cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        said = [
            subprocess.run(
                [sys.executable, "-c", CACHED],
                env=os.environ | made.environ | settings,
                stdout=subprocess.PIPE,
                text=True,
                timeout=PATIENCE,
                check=True,
            ).stdout
            for _ in range(2)
        ]
    first, second = (int(text.split()[-1]) for text in said)
    assert first == 0 and second > 0
