"""A pod's life from a laptop: what gcloud is asked for, and what a person reads."""

import json
import os
import shutil
import signal
import subprocess

import pytest

from launch import gcloud, remote, topology
from launch.pod import MOST_UNREACHED, judge, read, watch
from tests.launch import standins

WHERE = {"TPU_NAME": "pod", "ZONE": "us-west4-a", "PROJECT": "lab"}
FLAGS = ["--zone=us-west4-a", "--project=lab"]
QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
SMALL = {"TPU_TYPE": "v5e:2x4"}  # Two workers of the stand-in.
CONFIG = "configs/sft.py:7b"
NO_CAPACITY = 'RESOURCE_EXHAUSTED: There is no more capacity in the zone "us-west4-a"'

SUDO = """
import os, pathlib, sys

if sys.argv[2] == "mount":
    (pathlib.Path(os.environ["STANDIN_FOLDER"]) / "mounted").write_text(sys.argv[-1])
"""


@pytest.fixture
def cloud(tmp_path):
    made = standins.Standins(tmp_path)
    made.add("gcloud", standins.GCLOUD)
    made.add("df", standins.DF)
    made.python = str(made.add("project_python", standins.PYTHON))
    return made


def pod(cloud, *command, **environ):
    environ = WHERE | {"SABER_PYTHON": cloud.python} | environ
    return cloud.run("launch/pod.sh", *command, **environ)


def plug_chips(cloud, count):
    for slot in range(count):
        folder = cloud.folder / "sys/bus/pci/devices" / str(slot)
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x1ae0")
        (folder / "device").write_text("0x0063")


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        (
            "configs/cadpo.py:7b-v5e-256",
            [
                *("--node-id=pod", "--accelerator-type=v5litepod-256"),
                "--runtime-version=v2-alpha-tpuv5-lite",
            ],
        ),
        (
            "configs/sft.py:7b-2xv5e-128",
            [
                *("--node-count=2", "--node-prefix=pod", "--accelerator-type=v5litepod-128"),
                "--runtime-version=v2-alpha-tpuv5-lite",
            ],
        ),
        (
            "configs/sft.py:7b-v5p-128",
            [
                *("--node-id=pod", "--accelerator-type=v5p-128"),
                "--runtime-version=v2-alpha-tpuv5",
            ],
        ),
        (
            "configs/sft.py:7b-lora-v6e-8",
            ["--node-id=pod", "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e"],
        ),
    ],
)
def test_create_asks_for_what_the_recipe_is_made_for(cloud, recipe, flags):
    done = pod(cloud, "create", recipe)
    assert done.returncode == 0, done.stderr
    (create,) = cloud.calls(*QUEUED, "create")
    assert create[5:] == ["pod", *FLAGS, *flags]


def test_every_recipe_has_tpus_that_can_be_asked_for():
    from configs.pods import RECIPES

    for name, recipe in RECIPES.items():
        shape = topology.of_recipe(f"configs/sft.py:{name}")
        assert str(shape) == recipe.topology and shape.count == recipe.slices


def test_create_waits_in_the_queue_and_says_how_it_goes(cloud):
    (cloud.folder / "waits").write_text("ACTIVE")
    done = pod(cloud, "create", CONFIG, "--spot", "--disk=records", **SMALL)
    assert done.returncode == 0, done.stderr
    assert "pod is WAITING_FOR_RESOURCES" in done.stdout and "pod is READY" in done.stdout
    (create,) = cloud.calls(*QUEUED, "create")
    disk = "--data-disk=source=projects/lab/zones/us-west4-a/disks/records,mode=read-only"
    assert create[-2:] == ["--spot", disk]


@pytest.mark.parametrize(
    ("refusal", "advice"),
    [
        (NO_CAPACITY, "launch/pod.sh watch, which goes on asking"),
        ("Quota limit 'TPUV5sLitepodPerProject' has been exceeded. Limit: 0", "Ask for quota"),
        ("PERMISSION_DENIED: tpu.nodes.create", "roles/tpu.admin"),
        ("ALREADY_EXISTS: Resource already exists", "launch/pod.sh run"),
    ],
)
def test_a_refusal_is_quoted_with_what_to_do(cloud, refusal, advice):
    (cloud.folder / "create_refuses").write_text(refusal)
    done = pod(cloud, "create", CONFIG, **SMALL)
    assert done.returncode == 1
    assert refusal in done.stderr and advice in done.stderr


@pytest.mark.parametrize(
    ("command", "environ", "complaint"),
    [
        (("create", CONFIG), {}, "Name a recipe of configs/pods.py"),
        (("create", CONFIG), {"TPU_TYPE": "tpu7x:2x2x1"}, "exists on GKE alone"),
        (("create", CONFIG), {"TPU_TYPE": "v5e:16"}, "have 2 numbers"),
        (
            ("create", "configs/sft.py:7b-v5e-256"),
            {"TPU_TYPE": "v5e:8x16"},
            "TPU_TYPE is v5e:8x16, but configs/sft.py:7b-v5e-256 is made for v5e:16x16",
        ),
        (("create", CONFIG, "--spots"), SMALL, "unknown --spots"),
        (("watch",), {}, "watch what?"),
        (("delete",), {"ZONE": ""}, "ZONE not set"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_asked_for(cloud, command, environ, complaint):
    done = pod(cloud, *command, **environ)
    assert done.returncode == 1 and complaint in done.stderr
    assert not cloud.calls(*QUEUED, "create") and not cloud.calls(*QUEUED, "delete")


def test_preflight_finds_nothing_wrong_where_nothing_is(cloud):
    plug_chips(cloud, 4)
    assert pod(cloud, "create", CONFIG, **SMALL).returncode == 0
    done = pod(cloud, "preflight", CONFIG, "--config.root=gs://runs/7b", **SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 workers looked at: 0 problems" in done.stdout


def test_preflight_names_the_workers_with_each_problem(cloud):
    assert pod(cloud, "create", CONFIG, **SMALL).returncode == 0
    done = pod(cloud, "preflight", CONFIG, "--config.root=gs://locked/7b", **SMALL)
    assert done.returncode == 1
    both = "[pod worker 0, pod worker 1]"
    assert f"403 no storage.objects.create in locked  {both}" in done.stdout
    assert f"0 chips are attached, the recipe is made for 8 (v5e:2x4)  {both}" in done.stdout


@pytest.mark.parametrize("absent", ["gs://runs/7b/init", "/no/records"])
def test_preflight_looks_for_what_the_run_starts_from(cloud, absent):
    plug_chips(cloud, 4)
    assert pod(cloud, "create", CONFIG, **SMALL).returncode == 0
    (cloud.folder / "absent").write_text(absent)
    records = "/no/records" if absent == "/no/records" else "/"
    settings = ("--config.root=gs://runs/7b", f"--config.data.path={records}")
    done = pod(cloud, "preflight", CONFIG, *settings, **SMALL)
    assert done.returncode == 1
    (problem,) = [line for line in done.stdout.splitlines() if "PROBLEM" in line]
    assert f"there is no {absent}, or it cannot be read  [pod worker 0, pod worker 1]" in problem


def test_a_disk_is_mounted_once_for_reading(cloud):
    plug_chips(cloud, 4)
    cloud.add("sudo", SUDO)
    cloud.add("mountpoint", standins.MOUNTPOINT)
    (cloud.folder / "dev").mkdir()
    (cloud.folder / "dev/sdb").touch()
    places = {"DEVICES": str(cloud.folder / "dev"), "DISKS": str(cloud.folder / "disks")}
    assert pod(cloud, "create", CONFIG, "--disk=records", **SMALL).returncode == 0
    shutil.rmtree(cloud.folder / "pod/1")  # One worker, because both have the same folders here.
    about = {"state": "READY", "networkEndpoints": [{"ipAddress": "10.0.0.1"}]}
    (cloud.folder / "tpu-vm-pod.json").write_text(json.dumps(about))
    for _ in range(2):
        assert pod(cloud, "run", CONFIG, **SMALL, **places).returncode == 0
    mounts = [call for call in cloud.calls("sudo") if "mount" in call]
    device, folder = f"{cloud.folder}/dev/sdb", f"{cloud.folder}/disks/data"
    assert mounts == [["sudo", "-n", "mount", "-o", "ro,noload", device, folder]]


def test_preflight_names_the_worker_whose_disk_is_full(cloud):
    plug_chips(cloud, 4)
    assert pod(cloud, "create", CONFIG, **SMALL).returncode == 0
    (cloud.folder / "pod/1/free_gib").write_text("19")
    done = pod(cloud, "preflight", CONFIG, **SMALL)
    assert done.returncode == 1
    (problem,) = [line for line in done.stdout.splitlines() if "PROBLEM" in line]
    assert "less than 20 GiB are free" in problem and problem.endswith("[pod worker 1]")


def test_preflight_names_workers_with_another_python():
    facts = "chips 4\npython{}\nfree_gib 90"
    answers = {("pod", i): facts.format(" 3.12.3" if i else " 3.11.9") for i in range(4)}
    shape, node = topology.parse("v5e:4x4"), gcloud.Node("pod", 4)
    problems, hints = judge(shape, [node], answers)
    assert not problems
    assert hints == {
        "workers differ: Python 3.11.9 here": [("pod", 0)],
        "workers differ: Python 3.12.3 here": [("pod", i) for i in (1, 2, 3)],
    }


def test_preflight_names_workers_whose_answer_cannot_be_used():
    answers = {("pod", 0): "chips 4\npython 3.12.3\nfree_gib 90", ("pod", 1): "tar: No space left"}
    problems, _ = judge(topology.parse("v5e:2x4"), [gcloud.Node("pod", 3)], answers)
    assert problems == {
        "its answer cannot be used: tar: No space left": [("pod", 1)],
        "does not answer over ssh": [("pod", 2)],
    }


def test_watch_gets_tpus_again_whenever_they_are_taken_back_and_gives_them_up_at_the_end(cloud):
    (cloud.folder / "create_refuses").write_text(NO_CAPACITY)
    (cloud.folder / "taken_back").touch()
    done = pod(cloud, "watch", CONFIG, "--spot", "--delete", **SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no capacity in us-west4-a" in done.stdout and "pod was taken back" in done.stdout
    assert done.stdout.count("chain with") == 2
    # Refused, given, taken back, given again.
    assert len(cloud.calls(*QUEUED, "create")) == 3
    deletes = [call[5:] for call in cloud.calls(*QUEUED, "delete")]
    assert deletes == 2 * [["pod", *FLAGS, "--force", "--quiet"]]
    assert not (cloud.folder / "queued-resources-pod.json").exists()


def test_watch_asks_again_when_a_request_is_taken_back_while_it_waits(cloud):
    (cloud.folder / "waits").write_text("SUSPENDED\nFAILED\nFAILED")
    done = pod(cloud, "watch", CONFIG, **SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pod is PREEMPTED" in done.stdout and "making another one in a while" in done.stdout
    assert len(cloud.calls(*QUEUED, "create")) == 4


def test_watch_gives_up_on_requests_that_always_fail(cloud):
    (cloud.folder / "waits").write_text("FAILED\n" * 100)
    done = pod(cloud, "watch", CONFIG, **SMALL, RECONNECT_SECONDS="0.01")
    assert done.returncode == 1
    assert "5 requests in a row failed" in done.stderr
    assert (cloud.folder / "queued-resources-pod.json").exists()


def test_watch_deletes_the_request_of_a_tpu_vm_that_is_gone(cloud):
    assert pod(cloud, "create", CONFIG, **SMALL).returncode == 0
    (cloud.folder / "tpu-vm-pod.json").unlink()
    shutil.rmtree(cloud.folder / "pod")
    done = pod(cloud, "watch", CONFIG, **SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(cloud.calls(*QUEUED, "delete")) == 1


def test_watch_gives_up_on_a_run_that_fails_by_itself_and_leaves_the_tpus(cloud):
    assert pod(cloud, "create", CONFIG, **SMALL).returncode == 0
    (cloud.folder / "pod/1/ends_with").write_text("3")
    done = pod(cloud, "watch", CONFIG, **SMALL)
    assert done.returncode == 3
    assert "failed 3 times in a row" in done.stdout
    assert (cloud.folder / "queued-resources-pod.json").exists()


@pytest.fixture
def heard():
    """Children hear SIGINT, also where these tests run in the background of a shell, which lets all
    its children ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_ends_watch_and_not_the_run(cloud):
    assert pod(cloud, "create", CONFIG, **SMALL).returncode == 0
    for worker in "01":
        (cloud.folder / "pod" / worker / "goes_on").touch()
    watching = subprocess.Popen(
        ["launch/pod.sh", "watch", CONFIG],
        cwd=standins.ROOT,
        env=cloud.environ(**WHERE, **SMALL, SABER_PYTHON=cloud.python),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches all processes of the terminal.
    )
    assert watching.stdout is not None
    while "chain with" not in watching.stdout.readline():
        assert watching.poll() is None
    os.killpg(watching.pid, signal.SIGINT)
    said, complaints = watching.communicate(timeout=60)
    assert watching.returncode == 1 and "the run goes on" in complaints
    assert "starting it again" not in said
    job = ["launch/job.sh", "state"]
    for worker in "01":
        home = cloud.folder / "pod" / worker
        state = subprocess.run(job, cwd=home / "saber_jax", capture_output=True, check=True)
        assert state.stdout == b"running\n"
        (home / "goes_on").unlink()


@pytest.fixture
def unreached(monkeypatch):
    """A pod that is READY, whose workers are reached at the given try, and lost again if more
    numbers follow."""

    def tries(*counts):
        silent, lost = (remote.Unreached("no connection to pod.", heard=h) for h in (False, True))
        rows = [[*(count - 1) * [silent], lost] for count in counts]
        *failures, _ = (outcome for row in rows for outcome in row)
        outcomes = iter([*failures, 0])

        def run(*_):
            outcome = next(outcomes)
            if outcome:
                raise outcome
            return outcome

        monkeypatch.setattr(remote, "run", run)

    monkeypatch.setenv("RECONNECT_SECONDS", "0")
    monkeypatch.setattr(gcloud.Pod, "state", lambda _: "READY")
    monkeypatch.setattr(gcloud.Pod, "nodes", lambda _: [gcloud.Node("pod", 2)])
    return tries


def test_a_pod_out_of_reach_is_no_failure_of_the_run(unreached, capsys):
    where, arguments = gcloud.Pod("pod", "zone", "lab"), read(["configs/sft.py:7b-v5e-256"])
    unreached(MOST_UNREACHED)
    assert watch(where, arguments) == 0
    assert "failed" not in capsys.readouterr().out
    unreached(MOST_UNREACHED, MOST_UNREACHED - 1)  # Only those in a row count.
    assert watch(where, arguments) == 0
    unreached(MOST_UNREACHED + 1)
    with pytest.raises(remote.Unreached):
        watch(where, arguments)


def test_watch_does_not_start_again_what_a_person_stopped(cloud):
    assert pod(cloud, "create", CONFIG, **SMALL).returncode == 0
    for worker in "01":
        (cloud.folder / "pod" / worker / "ends_with").write_text("75")
    done = pod(cloud, "watch", CONFIG, **SMALL)
    assert done.returncode == 75 and "told to stop" in done.stdout


@pytest.mark.parametrize("kind", ["fails", "answer_is_lost"])
def test_an_api_that_fails_for_a_moment_ends_no_watch(cloud, kind):
    for verb in ("create", "delete"):
        (cloud.folder / f"{verb}_{kind}").write_text("2\nERROR: UNAVAILABLE: 503 backend error")
    done = pod(cloud, "watch", CONFIG, "--delete", **SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pod is deleted" in done.stdout
    tries = 3 if kind == "fails" else 2
    assert len(cloud.calls(*QUEUED, "create")) == len(cloud.calls(*QUEUED, "delete")) == tries
    assert not (cloud.folder / "queued-resources-pod.json").exists()


@pytest.mark.parametrize("verb", ["watch", "run"])
def test_a_pod_of_another_recipe_is_refused(cloud, verb):
    assert pod(cloud, "create", CONFIG, **SMALL).returncode == 0
    done = pod(cloud, verb, "configs/cadpo.py:7b-lora-v5e-16")
    assert done.returncode == 1
    made_for = "configs/cadpo.py:7b-lora-v5e-16 is made for v5e:4x4 (v5litepod-16)"
    assert f"pod has v5litepod-8, but {made_for}" in done.stderr
    assert not cloud.calls("gcloud", "compute", "tpus", "tpu-vm", "ssh")


def test_the_rest_of_a_run_may_be_done_on_a_smaller_machine_that_is_named(cloud):
    assert pod(cloud, "create", CONFIG, **SMALL).returncode == 0
    done = pod(cloud, "run", "configs/cadpo.py:7b-v5e-256", **SMALL)
    assert done.returncode == 0, done.stderr


def test_a_refusal_is_final(cloud):
    (cloud.folder / "create_refuses").write_text(NO_CAPACITY)
    assert pod(cloud, "create", CONFIG, **SMALL).returncode == 1
    assert len(cloud.calls(*QUEUED, "create")) == 1


def test_delete_gives_back_what_is_there(cloud):
    assert pod(cloud, "create", CONFIG, **SMALL).returncode == 0
    assert pod(cloud, "delete").stdout == "pod is deleted\n"
    assert pod(cloud, "delete").stdout == "pod was not there\n"
