"""From a laptop: what gcloud is asked to do, and what becomes of it on the workers."""

import json
import signal
import subprocess
import textwrap
import time

import pytest

from launch import gcloud
from tests.launch import standins

WHERE = {"TPU_NAME": "pod", "ZONE": "us-west4-a", "PROJECT": "lab"}
FLAGS = ["--zone=us-west4-a", "--project=lab"]
RUN = ("launch/tpu_run.sh", "configs/sft.py:7b", "--config.data.path=/data/it's mine")


@pytest.fixture
def cloud(tmp_path):
    """A TPU VM `pod` of three workers, each with an interpreter that stands in for ours."""
    made = standins.Standins(tmp_path)
    made.add("gcloud", standins.GCLOUD)
    made.python = str(made.add("project_python", standins.PYTHON))
    add_node(made, "pod", workers=3)
    return made


def add_node(cloud, name, *, workers):
    for worker in range(workers):
        (cloud.folder / name / str(worker)).mkdir(parents=True)
    about = {"state": "READY", "networkEndpoints": [{"ipAddress": "10.0.0.1"}] * workers}
    (cloud.folder / f"tpu-vm-{name}.json").write_text(json.dumps(about))


def launch(cloud, *command, **environ):
    return cloud.run(*command, **(WHERE | {"SABER_PYTHON": cloud.python} | environ))


def test_all_workers_get_the_code_and_run_it_and_worker_0_is_heard(cloud):
    done = launch(cloud, *RUN)
    assert done.returncode == 0, done.stderr
    ours = f"chain with --config=configs/sft.py:7b {RUN[2]}"
    assert done.stdout.count(ours) == 1
    for worker in range(3):
        home = cloud.folder / "pod" / str(worker)
        assert ours in (home / "saber_jax/runs/job/log").read_text()
        assert (home / "saber_jax/saber_jax/main.py").exists()
    tpus = ("gcloud", "compute", "tpus", "tpu-vm")
    assert cloud.calls(*tpus, "describe") == [[*tpus, "describe", "pod", *FLAGS, "--format=json"]]
    (copy,) = cloud.calls(*tpus, "scp")
    assert copy[6:] == ["pod:saber_jax.tar.gz", "--worker=all", *FLAGS]
    _, start, follow, end = cloud.calls(*tpus, "ssh")
    assert start[5:9] == ["pod", "--worker=all", *FLAGS]
    assert start[9].endswith(
        "launch/job.sh start configs/sft.py:7b '--config.data.path=/data/it'\"'\"'s mine'"
    )
    assert follow[6:] == ["--worker=0", *FLAGS, "--command=cd saber_jax && launch/job.sh follow"]
    assert end[9] == "--command=cd saber_jax && launch/job.sh end"


@pytest.mark.parametrize("folder", ["None", "."])
def test_answers_are_found_wherever_gcloud_writes_them(cloud, monkeypatch, folder):
    monkeypatch.setenv("PATH", cloud.environ()["PATH"])
    written = f"""
        import pathlib, sys
        flags = dict(a[2:].split("=", 1) for a in sys.argv if a.startswith("--"))
        out = pathlib.Path("." if {folder!r} == "None" else flags["output-directory"])
        (out / {folder!r} / "11.log").write_text("hello")
    """
    cloud.add("gcloud", textwrap.dedent(written))
    pod = gcloud.Pod("pod", "us-west4-a", "lab")
    assert pod.on_all(gcloud.Node("pod", 12), "echo hello") == (0, {11: "hello"})


def test_the_worst_worker_decides_and_is_quoted(cloud):
    (cloud.folder / "pod/0/ends_with").write_text("75")
    (cloud.folder / "pod/2/ends_with").write_text("3")
    done = launch(cloud, *RUN)
    assert done.returncode == 3
    assert "pod worker 2 ended with status 3:\nchain with" in done.stderr
    assert "worker 1" not in done.stderr


def test_a_lost_connection_is_taken_up_again(cloud):
    (cloud.folder / "pod/0/drop_connections").write_text("2")
    done = launch(cloud, *RUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("connection lost, the run goes on") == 2


def test_an_api_that_fails_for_a_moment_is_asked_again_and_a_refusal_is_quoted(cloud):
    (cloud.folder / "describe_fails").write_text("2\nERROR: UNAVAILABLE: 503 backend error")
    assert launch(cloud, *RUN).returncode == 0
    (cloud.folder / "describe_fails").write_text("99\nERROR: PERMISSION_DENIED: tpu.nodes.get")
    done = launch(cloud, *RUN)
    assert done.returncode == 1
    assert "tpu.nodes.get" in done.stderr and "roles/tpu.admin" in done.stderr


def test_a_running_job_is_looked_on_at_and_stops_when_told_so(cloud):
    for worker in range(3):
        (cloud.folder / "pod" / str(worker) / "goes_on").touch()
    environ = cloud.environ(**WHERE, SABER_PYTHON=cloud.python)
    options = {"cwd": standins.ROOT, "env": environ, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen(RUN, **options)
    logs = [cloud.folder / "pod" / str(w) / "saber_jax/runs/job/log" for w in range(3)]
    deadline = time.monotonic() + 60
    while not all(log.exists() and "chain with" in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)  # The laptop is closed.
    first.wait()

    second = subprocess.Popen(RUN, **options)
    assert second.stdout.readline() == "a run is going on on pod (3 workers); looking on\n"
    assert launch(cloud, "launch/tpu_run.sh", "--stop").returncode == 0
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 75
    assert "saving" in said
    assert len(cloud.calls("gcloud", "compute", "tpus", "tpu-vm", "scp")) == 1


def test_a_queued_resource_is_all_of_its_slices(cloud):
    about = {
        "state": {"state": "ACTIVE"},
        "tpu": {"nodeSpec": [{"multisliceParams": {"nodeCount": 2, "nodeIdPrefix": "slice"}}]},
    }
    (cloud.folder / "queued-resources-both.json").write_text(json.dumps(about))
    for name in ("slice-0", "slice-1"):
        add_node(cloud, name, workers=2)
    (cloud.folder / "slice-1/1/ends_with").write_text("4")
    done = launch(cloud, *RUN, TPU_NAME="both")
    assert done.returncode == 4
    assert "slice-1 worker 1 ended with status 4" in done.stderr
    for node in ("slice-0", "slice-1"):
        assert (cloud.folder / node / "0/saber_jax/runs/job/log").exists()


def test_a_machine_that_was_started_anew_is_not_taken_for_one_that_runs(cloud):
    assert launch(cloud, *RUN).returncode == 0
    job = cloud.folder / "pod/1/saber_jax/runs/job"
    (job / "status").unlink()
    (job / "pid").write_text("1")  # Somebody else has that number now.
    (job / "boot").write_text("an earlier start")
    state = subprocess.run(
        ["launch/job.sh", "state"],
        cwd=job.parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert state.stdout == "exit 137\n"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ZONE": ""}, "ZONE not set"),
        ({"TPU_NAME": "nobody"}, "no TPU VM and no queued resource named 'nobody' in us-west4-a"),
        ({"TPU_NAME": "waiting"}, "queued resource waiting is WAITING_FOR_RESOURCES, not ACTIVE"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_copied(cloud, change, complaint):
    state = {"state": {"state": "WAITING_FOR_RESOURCES"}}
    (cloud.folder / "queued-resources-waiting.json").write_text(json.dumps(state))
    done = launch(cloud, *RUN, **change)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert not cloud.calls("gcloud", "compute", "tpus", "tpu-vm", "scp")
