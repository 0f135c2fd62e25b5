"""What a disk damaged is named, never used, and costs the steps since the checkpoint before it."""

import errno
import json
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax import sharding
from saber_jax.models.config import saber_config
from saber_jax.runs import checksums
from saber_jax.train import saved
from saber_jax.train.checkpoint import Checkpoints, SaveError, save_params
from saber_jax.train.step import TrainState
from tests import full_disk

# Orbax drops tasks whose exceptions nobody fetched.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(step):
    everywhere = sharding.replicated(sharding.make_mesh(data=1, fsdp=-1, tensor=1))
    w = jnp.arange(12.0).reshape(3, 4) + step
    tree = TrainState(jnp.int32(step), {"text/w": w}, {}, {"mu": -w})
    return jax.device_put(tree, everywhere)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("intact")
    checkpoints = Checkpoints(folder, every=2)
    for step in (2, 4):
        checkpoints.save(state(step), {"step": step, "plan": "abc"})
    checkpoints.close()
    return folder


@pytest.fixture
def workdir(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "run")


def restore(workdir, **options):
    checkpoints = Checkpoints(workdir, every=2, **options)
    restored = checkpoints.restore(state(0), {"plan": "abc"})
    checkpoints.close()
    return restored


def flip(path, byte, bit):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def names(workdir):
    return sorted(p.name for p in (workdir / "checkpoints").iterdir())


def test_an_intact_step_comes_back(workdir):
    restored = restore(workdir)
    np.testing.assert_array_equal(restored.trainable["text/w"], state(4).trainable["text/w"])
    assert names(workdir) == ["2", "4"]


def files_of(step):
    return sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size)


def test_no_flipped_bit_changes_what_is_restored(workdir, intact, tmp_path):
    """Flips a bit in each file of the newest step: it is harmless, or the step before is used."""
    found = files_of(workdir / "checkpoints/4")
    assert len(found) > 10
    aside = 0
    for number, path in enumerate(found):
        run = shutil.copytree(intact, tmp_path / f"flipped{number}")
        target = run / path.relative_to(workdir)
        flip(target, target.stat().st_size * 2 // 3, number % 8)
        restored = restore(run)
        step = int(restored.step)
        aside += step == 2
        assert names(run) == (["2", "4"] if step == 4 else ["2", "4.damaged"])
        np.testing.assert_array_equal(restored.trainable["text/w"], state(step).trainable["text/w"])
        np.testing.assert_array_equal(restored.opt_state["mu"], state(step).opt_state["mu"])
    assert aside >= 4


DAMAGES = {
    "an empty folder": lambda step: (shutil.rmtree(step), step.mkdir()),
    "an item gone": lambda step: shutil.rmtree(step / "opt_state"),
    "the digests gone": lambda step: shutil.rmtree(step / "digests"),
    "a data file gone": lambda step: max(files_of(step), key=lambda p: "/d/" in str(p)).unlink(),
    "a data file cut short": lambda step: [
        p.write_bytes(p.read_bytes()[:-9]) for p in files_of(step) if p.parent.name == "d"
    ],
    "a key of Orbax's own files": lambda step: [
        p.write_text(p.read_text().replace("write_shape", "writf_shape"))
        for p in step.glob("*/array_metadatas/process_0")
    ],
    "a shape among the digests": lambda step: (step / "digests/metadata").write_text(
        (step / "digests/metadata").read_text().replace("[3, 4]", "[3, 5]")
    ),
    "meta of another step": lambda step: (step / "meta/metadata").write_text(
        json.dumps({"step": 3, "plan": "abc"})
    ),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_step_is_kept_aside_loudly_and_the_one_before_used(workdir, how, capsys):
    DAMAGES[how](workdir / "checkpoints/4")
    assert int(restore(workdir).step) == 2
    assert names(workdir) == ["2", "4.damaged"]
    said = capsys.readouterr().err
    assert "checkpoints/4 is damaged" in said and "kept as 4.damaged" in said
    assert "step 2 is used instead" in said


def test_a_step_of_an_earlier_version_without_a_checksum_of_its_digests_comes_back(workdir):
    file = workdir / "checkpoints/4/digests/metadata"
    entries = json.loads(file.read_text())
    del entries[checksums.CHECKSUM]
    file.write_text(json.dumps(entries))
    assert int(restore(workdir).step) == 4


@pytest.mark.parametrize("how", DAMAGES)
def test_a_strict_run_refuses_it_and_touches_nothing(workdir, how):
    DAMAGES[how](workdir / "checkpoints/4")
    with pytest.raises(saved.DamagedError, match=r"checkpoints/4 is damaged.*strict_restore"):
        restore(workdir, strict=True)
    assert names(workdir) == ["2", "4"]


@pytest.mark.parametrize("how", ["an empty folder", "an item gone", "the digests gone"])
def test_readers_name_a_step_that_is_not_whole_and_the_one_before(workdir, how):
    DAMAGES[how](workdir / "checkpoints/4")
    if how == "an item gone":
        shutil.rmtree(workdir / "checkpoints/4/params")
    with pytest.raises(saved.DamagedError, match=r"4 is damaged: .*missing.* goes on from step 2"):
        saved.newest(workdir)


def test_when_all_are_damaged_the_run_begins_again(workdir, capsys):
    for step in (2, 4):
        shutil.rmtree(workdir / f"checkpoints/{step}/params")
    assert restore(workdir) is None
    assert "begins again at step 0" in capsys.readouterr().err
    assert names(workdir) == ["2.damaged", "4.damaged"]


def test_what_killed_saves_left_is_removed_and_nothing_else(workdir):
    checkpoints = workdir / "checkpoints"
    for name in ("6.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp-17"):
        shutil.copytree(checkpoints / "4", checkpoints / name)
    (checkpoints / "3.damaged").mkdir()
    (checkpoints / "mine").mkdir()
    assert int(restore(workdir).step) == 4
    assert names(workdir) == ["2", "3.damaged", "4", "mine"]


def test_a_step_damaged_twice_keeps_both(workdir):
    (workdir / "checkpoints/4.damaged").mkdir()
    shutil.rmtree(workdir / "checkpoints/4/meta")
    assert int(restore(workdir).step) == 2
    assert names(workdir) == ["2", "4.damaged", "4.damaged-2"]


def test_another_network_is_refused_and_nothing_is_called_damaged(workdir):
    checkpoints = Checkpoints(workdir, every=2)
    other = state(0)
    wide = TrainState(other.step, {"text/w": jnp.zeros((3, 8))}, {}, other.opt_state)
    with pytest.raises(ValueError, match="holds another network or optimizer: params/text/w"):
        checkpoints.restore(wide, {"plan": "abc"})
    assert names(workdir) == ["2", "4"]


def test_a_save_that_gets_no_folder_fails_with_the_reason_and_leaves_no_thread_waiting(tmp_path):
    before = set(threading.enumerate())
    checkpoints = Checkpoints(tmp_path, every=2)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").touch()  # A folder in it is refused, as by a full disk.
    with pytest.raises(SaveError, match=r"could not be written to .*: Not a directory"):
        checkpoints.save(state(2), {"step": 2, "plan": "abc"})
        checkpoints.close()
    after = set(threading.enumerate()) - before
    # Python waits for these when it exits.
    assert not [t.name for t in after if type(t).__module__.startswith("orbax") and not t.daemon]


@pytest.mark.parametrize("room", [0, 1000])
def test_weights_that_a_full_disk_refuses_end_in_one_sentence(room, tmp_path):
    weights = {"w": jnp.ones(10_000)}
    with (
        full_disk.files_of_at_most(room),
        pytest.raises(
            SaveError, match=rf"could not be written to {tmp_path}: File too large.*\. Make"
        ),
    ):
        save_params(tmp_path, weights, saber_config("tiny"))
    assert not (tmp_path / "model.json").exists()


def test_reading_is_tried_again_while_storage_is_out_of_reach(monkeypatch):
    monkeypatch.setattr(saved, "PAUSES", (0, 0))
    left = [OSError(5, "Input/output error"), ValueError("UNAVAILABLE: try later")]

    def read():
        if left:
            raise left.pop()
        return "read"

    assert saved.reading(read) == "read" and not left


def caused_by(error):
    """An error of a library that hides what the disk said."""
    try:
        raise error
    except OSError:
        try:
            raise ValueError("params/text/w could not be assembled")
        except ValueError as hiding:
            return hiding


OUTAGES = {
    "a bucket": lambda: ValueError(
        "UNAVAILABLE: Error reading gs://b/x: 503 [source locations='x']"
    ),
    "a library": lambda: caused_by(OSError(errno.EIO, os.strerror(errno.EIO), "d/0")),
    "a client": lambda: OSError(errno.EIO, "HttpError: backend error", "d/0"),
    "a timeout": lambda: TimeoutError("no answer"),
    **{
        errno.errorcode[code]: lambda code=code: OSError(code, os.strerror(code))
        for code in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.ETIMEDOUT)
    },
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", OUTAGES)
def test_an_outage_of_storage_ends_the_run_and_renames_no_step(workdir, monkeypatch, name, count):
    monkeypatch.setattr(saved, "PAUSES", (0, 0))
    checkpoints = Checkpoints(workdir, every=2)

    def broken(*args, **options):
        del args, options
        raise OUTAGES[name]()

    with monkeypatch.context() as during:
        during.setattr(checkpoints._manager, "restore", broken)
        during.setattr(jax, "process_count", lambda: count)
        with pytest.raises(saved.UnreachableError, match=r"checkpoints/4 could not be read: \w+"):
            checkpoints.restore(state(0), {"plan": "abc"})
    checkpoints.close()
    assert names(workdir) == ["2", "4"]
    assert int(restore(workdir).step) == 4


def test_a_reader_does_not_call_a_step_damaged_that_storage_withholds(workdir):
    step = saved.newest(workdir)
    with pytest.raises(saved.UnreachableError, match="stays"), saved.readable(step):
        raise OUTAGES["a bucket"]()
