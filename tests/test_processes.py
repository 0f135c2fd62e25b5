"""Training by several processes: the same numbers, one checkpoint, and a common end."""

import json
import math
import shutil
import signal
import time

import numpy as np
import pytest

from data_prep.records import dataset
from saber_jax.data.records import RecordSource, write_outlines
from saber_jax.runs import distributed
from saber_jax.train.references import ReferenceCache, ReferenceInputs
from saber_jax.tree import flatten
from tests import synthetic
from tests.finished_run import load
from tests.processes import running
from tests.torn import tear

pytestmark = pytest.mark.slow

# One process compiles alone on two cores while the others wait.
PATIENCE = 400
MESHES = {1: (1, 8, 1), 2: (1, 8, 1), 4: (2, 2, 2)}
"""(data, fsdp, tensor) by number of processes."""


@pytest.fixture(scope="module")
def records(tmp_path_factory, tokenizer):
    """Built records of sixteen made-up clips, and preference pairs for them."""
    out = tmp_path_factory.mktemp("records")
    made = [synthetic.record(i, words=2) for i in range(16)]
    dataset.write(out, {"train": made, "preference": made}, lambda record: record)
    (out / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    with (out / "pairs.jsonl").open("w") as file:
        for i in range(16):
            pair = {"chosen": "[video_desc] calm red room", "rejected": f"[video_desc] {i} quiet"}
            file.write(json.dumps({"clip_id": f"clip{i}", **pair}) + "\n")
    return out


@pytest.fixture(scope="module")
def torn(records, tmp_path_factory):
    """The same records, but record 5 is truncated in a file whose outlines still have its size."""
    out = tmp_path_factory.mktemp("torn")
    shutil.copytree(records, out, dirs_exist_ok=True)
    for split in ("train", "preference"):
        write_outlines(RecordSource(out, split))
        tear(out, split, 5)
    return out


def command(stage, records, root, mesh, program="main", **more):
    """The command line of a run of eight steps of eight rows."""
    data, fsdp, tensor = mesh
    settings = {
        "root": root,
        "steps": 8,
        "checkpoint_every": 4,
        "log_every": 4,
        "mesh.data": data,
        "mesh.fsdp": fsdp,
        "mesh.tensor": tensor,
        "data.path": records,
        "data.batch_rows": 8,
        "data.length": 256,
        "data.patches": 72,
        "data.chunks": 1,
        "data.segments": 1,
        "data.targets": 128,
        "compute.head_chunk": 128,
    }
    if stage == "cadpo":
        settings |= {"data.pairs": records / "pairs.jsonl", "data.response": 64}
    settings |= {key.replace("__", "."): value for key, value in more.items()}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["-m", f"saber_jax.{program}", f"--config=configs/{stage}.py:tiny", *flags]


def start(stage, records, root, *, count, mesh=None, odd=(), **more):
    """`count` processes of that run."""
    mesh = mesh or MESHES[count]
    return running(
        command(stage, records, root, mesh, **more),
        root / "logs",
        count=count,
        odd=odd,
        devices=math.prod(mesh),
    )


def train(stage, records, root, *, count, **more):
    with start(stage, records, root, count=count, **more) as processes:
        assert processes.wait(PATIENCE) == [0] * count, processes.text()


def preempt(records, root, *, count, after, **more):
    """Tells a run to stop once `after` steps are logged; returns what its first process said."""
    log = root / "sft" / "metrics.jsonl"
    with start("sft", records, root, count=count, **more) as processes:
        processes.wait_until(
            lambda: log.exists() and log.read_text().count("\n") >= after, PATIENCE
        )
        processes.members[-1].send_signal(signal.SIGTERM)
        statuses = processes.wait(120)
        assert statuses == [distributed.PREEMPTED] * count, processes.text()
        return processes.logs[0].read_text()


def metrics_of(root, stage):
    lines = (root / stage / "metrics.jsonl").read_text().splitlines()
    timing = ("seconds", "input_wait", "speed/", "hosts/")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(timing)} for line in lines
    ]


def assert_same_run(got, expected, stage):
    """Compares numbers that may differ by the order of floating-point sums."""
    for ours, theirs in zip(metrics_of(got, stage), metrics_of(expected, stage), strict=True):
        # These count the signs of margins, which are all rounding at the first steps.
        for name in [name for name in theirs if "accuracies" in name]:
            ours[name] = theirs[name] = 0.0
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
    theirs = flatten(load(expected / stage)[0])
    for name, leaf in flatten(load(got / stage)[0]).items():
        np.testing.assert_allclose(leaf, theirs[name], atol=3e-4, err_msg=name)


@pytest.fixture(scope="module")
def alone(records, tmp_path_factory):
    """Both stages by one process that holds all eight devices."""
    root = tmp_path_factory.mktemp("alone")
    for stage in ("sft", "cadpo"):
        train(stage, records, root, count=1)
    return root


@pytest.mark.parametrize("count", [2, 4])
def test_both_stages_equal_the_single_process_run(records, alone, tmp_path, count):
    for stage in ("sft", "cadpo"):
        train(stage, records, tmp_path, count=count)
        assert_same_run(tmp_path, alone, stage)


def test_microbatches_of_two_processes_equal_the_whole_batch(records, alone, tmp_path):
    for stage in ("sft", "cadpo"):
        train(stage, records, tmp_path, count=2, mesh=(1, 4, 1), compute__microbatches=2)
        assert_same_run(tmp_path, alone, stage)


def reference_inputs(root):
    return ReferenceInputs(**json.loads((root / "reference/whole/manifest.json").read_text()))


def references(root):
    return ReferenceCache(root / "reference", "whole", reference_inputs(root))


def test_processes_complete_a_reference_cache_and_keep_what_it_held(records, alone, tmp_path):
    whole, inputs = references(alone).values, reference_inputs(alone)
    assert len(whole) == 16
    # Marked, so that computing them again would show.
    held = {key: whole[key] + np.float32(1) for key in sorted(whole)[::2]}
    ReferenceCache(tmp_path / "reference", "whole", inputs).add(held)
    trained = alone / "sft"
    train("cadpo", records, tmp_path, count=2, program="reference", init__checkpoint=trained)
    got = references(tmp_path).values
    assert got.keys() == whole.keys()
    for key, values in got.items():
        np.testing.assert_allclose(values, held.get(key, whole[key]), rtol=2e-5, err_msg=key.hex())


@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 1)])
def test_a_preempted_run_saves_and_goes_on_with_other_processes_and_another_mesh(
    records, alone, tmp_path, first, second
):
    assert "and saved it. The same command goes on" in preempt(
        records, tmp_path, count=first, after=2
    )
    done = len(metrics_of(tmp_path, "sft"))
    assert done < 8
    assert max(int(p.name) for p in (tmp_path / "sft/checkpoints").iterdir()) == done
    train("sft", records, tmp_path, count=second)
    assert_same_run(tmp_path, alone, "sft")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_when_one_process_vanishes_all_end_soon_and_the_restart_resumes(
    records, alone, tmp_path, how
):
    log, heartbeat = tmp_path / "sft" / "metrics.jsonl", 10
    with start("sft", records, tmp_path, count=2, heartbeat_seconds=heartbeat) as processes:
        processes.wait_until(lambda: log.exists() and log.read_text().count("\n") >= 6, PATIENCE)
        processes.members[1].send_signal(how)
        began = time.monotonic()
        status = processes.members[0].wait(4 * heartbeat)
        assert status != 0 and time.monotonic() - began < 3 * heartbeat, processes.text()
        if how == signal.SIGSTOP:  # Awake again, it must not go on alone.
            processes.members[1].send_signal(signal.SIGCONT)
            assert processes.members[1].wait(4 * heartbeat) != 0
    train("sft", records, tmp_path, count=2)
    assert "resuming sft at step 4" in (tmp_path / "logs/process0.log").read_text()
    assert_same_run(tmp_path, alone, "sft")


def test_an_error_in_one_process_ends_all(records, tmp_path):
    heartbeat, odd = 10, ("--config.data.length=96",)
    with start(
        "sft", records, tmp_path, count=2, odd=odd, heartbeat_seconds=heartbeat
    ) as processes:
        assert processes.members[1].wait(PATIENCE) == 1
        assert processes.members[0].wait(4 * heartbeat) != 0, processes.text()
        assert "data.length: 256 there, 96 here" in processes.logs[1].read_text()


def quarantined(root, stage="sft"):
    lines = (root / stage / "quarantine.jsonl").read_text().splitlines()
    return [(entry["index"], entry["reason"]) for entry in map(json.loads, lines)]


def test_hosts_agree_on_a_torn_record_and_leave_it_out_after_a_resume_too(torn, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    most = {"data__max_bad_fraction": 0.1}
    train("sft", torn, alone, count=1, **most)
    preempt(torn, shared, count=2, after=3, **most)
    assert quarantined(shared) == [(5, "bad_record")]
    train("sft", torn, shared, count=2, **most)
    assert quarantined(alone) == quarantined(shared)
    assert sum(step["left_out"] for step in metrics_of(shared, "sft")) >= 4  # Once an epoch.
    assert_same_run(shared, alone, "sft")


def test_hosts_agree_on_the_pair_of_a_torn_record(torn, tmp_path):
    kept = []
    for count in (1, 2):
        root, most = tmp_path / str(count), {"data__max_bad_fraction": 0.1}
        train("cadpo", torn, root, count=count, init__checkpoint="", **most)
        kept.append((quarantined(root, "cadpo"), sorted(references(root).values)))
    assert kept[0] == kept[1] and len(kept[0][1]) == 15
    assert_same_run(tmp_path / "2", tmp_path / "1", "cadpo")


def test_more_torn_records_than_allowed_end_every_process(torn, tmp_path):
    with start("sft", torn, tmp_path, count=2, data__max_bad_fraction=0.01) as processes:
        assert all(processes.wait(PATIENCE)), processes.text()
        assert "1 of 16 examples cannot be used" in processes.logs[0].read_text()
