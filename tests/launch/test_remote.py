"""From a laptop: what gcloud is asked to do, and what becomes of it on the workers."""

import json
import os
import shutil
import signal
import subprocess
import textwrap
import time

import pytest

from launch import gcloud, remote
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
    assert copy[6:10] == ["pod:saber_jax.tar.gz", "--worker=all", *FLAGS]
    _, start, follow, end = cloud.calls(*tpus, "ssh")
    assert start[5:9] == ["pod", "--worker=all", *FLAGS]
    assert (
        "launch/job.sh start configs/sft.py:7b '--config.data.path=/data/it'\"'\"'s mine' "
        in (start[9])
    )
    assert follow[6:10] == ["--worker=0", *FLAGS, "--command=cd saber_jax && launch/job.sh follow"]
    assert end[9].endswith("; cd saber_jax && launch/job.sh end")


@pytest.mark.parametrize("folder", ["None", "."])
def test_answers_are_found_wherever_gcloud_writes_them(cloud, monkeypatch, folder):
    monkeypatch.setenv("PATH", cloud.environ()["PATH"])
    written = f"""
        import pathlib, sys
        flags = dict(a[2:].split("=", 1) for a in sys.argv if a.startswith("--"))
        out = pathlib.Path("." if {folder!r} == "None" else flags["output-directory"])
        (out / {folder!r} / "11.log").write_text("{gcloud.MARK}\\nhello")
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


@pytest.mark.parametrize("command", ["job.sh state", "job.sh start", "job.sh end"])
def test_what_ssh_says_and_gcloud_s_second_try_are_no_answers(cloud, command):
    (cloud.folder / "pod/1/breaks").write_text(command)
    done = launch(cloud, *RUN)
    assert done.returncode == 0, done.stderr
    assert not (cloud.folder / "pod/1/breaks").exists()
    assert (cloud.folder / "pod/1/saber_jax/runs/job/log").read_text().count("chain with") == 1


def test_nothing_is_started_while_a_worker_does_not_say_whether_a_run_goes_on(cloud):
    (cloud.folder / "pod/1/unreachable").touch()
    done = launch(cloud, *RUN)
    assert done.returncode == 1
    assert "pod worker 1 is not reached; ssh says: ssh: connect to host" in done.stderr
    assert "pod worker 1 did not say whether a run is going on there" in done.stderr
    assert not cloud.calls("gcloud", "compute", "tpus", "tpu-vm", "scp")


def test_a_start_that_fails_leaves_alone_what_was_running_before(cloud, monkeypatch):
    for name, value in cloud.environ(SABER_PYTHON=cloud.python).items():
        monkeypatch.setenv(name, value)
    pod, node = gcloud.Pod("pod", "us-west4-a", "lab"), gcloud.Node("pod", 3)
    for worker in range(2):
        (cloud.folder / "pod" / str(worker) / "goes_on").touch()
    (cloud.folder / "pod/2/saber_jax").touch()  # Nothing can be unpacked there.
    # Somebody else starts a run on worker 1 after all workers said that there is none.
    home = cloud.folder / "pod/1/saber_jax"
    shutil.copytree(standins.ROOT / "launch", home / "launch")
    job = ["launch/job.sh", "start", "theirs"]
    subprocess.run(job, cwd=home, env={**os.environ, "HOME": str(home.parent)}, check=True)
    with pytest.raises(SystemExit, match="pod worker 2 could not start"):
        remote.start(pod, [node], ["configs/sft.py:7b"])
    ours, theirs, _ = (cloud.folder / "pod" / str(w) / "saber_jax" for w in range(3))
    subprocess.run(["launch/job.sh", "end"], cwd=ours, check=True)
    assert state(theirs) == "running\n" and not (theirs / "saber_jax").exists()
    (cloud.folder / "pod/1/goes_on").unlink()


def state(checkout):
    job = ["launch/job.sh", "state"]
    return subprocess.run(job, cwd=checkout, capture_output=True, text=True, check=True).stdout


def test_a_lost_connection_is_taken_up_again(cloud):
    (cloud.folder / "pod/0/drop_connections").write_text("2")
    done = launch(cloud, *RUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("connection lost, the run goes on") == 2


def test_a_host_that_is_gone_is_noticed_by_every_connection(cloud):
    assert launch(cloud, *RUN).returncode == 0
    options = ["ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=6"]
    for verb, flag in (("scp", "--scp-flag"), ("ssh", "--ssh-flag")):
        for call in cloud.calls("gcloud", "compute", "tpus", "tpu-vm", verb):
            assert {f"{flag}=-o{option}" for option in options} <= set(call)


def test_only_output_ends_a_row_of_failed_connections(monkeypatch, capsys):
    monkeypatch.setenv("RECONNECT_SECONDS", "0")
    flapping = (remote.RECONNECTS - 1) * [(255, False)]
    failed_api = [(1, False)]
    connections = [*flapping, (255, True), *flapping, *failed_api, (0, True)]
    asked = iter(connections)
    monkeypatch.setattr(gcloud.Pod, "watch", lambda *_: next(asked))
    pod, node = gcloud.Pod("pod", "us-west4-a", "lab"), gcloud.Node("pod", 1)
    with pytest.raises(remote.Unreached, match="no connection to pod") as lost:
        remote.follow(pod, node)
    assert lost.value.heard
    assert next(asked) == (0, True)


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
    # Another laptop does not know the workers yet, and ssh says so.
    for worker in range(3):
        (cloud.folder / "pod" / str(worker) / "known").unlink()

    second = subprocess.Popen(RUN, **options)
    assert second.stdout.readline() == "a run is going on on pod (3 workers); looking on\n"
    assert launch(cloud, "launch/tpu_run.sh", "--stop").returncode == 0
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 75
    assert "saving" in said
    assert len(cloud.calls("gcloud", "compute", "tpus", "tpu-vm", "scp")) == 1


def test_stop_names_the_workers_that_it_did_not_reach(cloud):
    done = launch(cloud, "launch/tpu_run.sh", "--stop")
    assert done.returncode == 0 and "no run is going on" in done.stdout
    for worker in "02":
        (cloud.folder / "pod" / worker / "unreachable").touch()
    done = launch(cloud, "launch/tpu_run.sh", "--stop")
    assert done.returncode == 1 and "told to stop;" not in done.stdout
    assert "not told to stop, because not reached: pod worker 0, pod worker 2." in done.stderr


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
    assert state(job.parent.parent) == "exit 137\n"


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
