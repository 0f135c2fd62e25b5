"""On GKE: what kubectl is given, and how the run is followed to its end."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.launch import standins

SCHEMA = json.loads((Path(__file__).parent / "jobset_schema.json").read_text())
WHERE = {"GKE_IMAGE": "registry/saber:1", "TPU_TYPE": "v5e:16x16", "SLICES": "2", "CLAIM": "disk"}
RUN = ("launch/tpu_run.sh", "configs/cadpo.py:7b", '--config.data.path=/runs/"mine" $HOME')
POD = (
    "jobset.sigs.k8s.io/jobset-name=saber,jobset.sigs.k8s.io/job-index=0,"
    "batch.kubernetes.io/job-completion-index=0"
)


@pytest.fixture
def cluster(tmp_path):
    made = standins.Standins(tmp_path)
    made.add("kubectl", standins.KUBECTL)
    return made


def rendered(cluster, **change):
    shown = cluster.run("python3", "launch/gke.py", "--print", *RUN[1:], **(WHERE | change))
    assert shown.returncode == 0, shown.stderr
    jobset = yaml.safe_load(shown.stdout)
    jsonschema.Draft202012Validator(SCHEMA).validate(jobset)
    return jobset


def parts(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    return job, spec, spec["template"]["spec"]


def test_two_slices_of_v5e_256_are_two_jobs_of_64_hosts_with_four_chips_each(cluster):
    job, spec, pod = parts(rendered(cluster))
    assert job["replicas"] == 2
    assert spec["parallelism"] == spec["completions"] == 64
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    assert pod["containers"][0]["command"] == [*RUN, "--config.root=/runs/7b"]


def test_what_every_pod_runs_leaves_its_results_on_the_shared_disk(cluster):
    _, _, pod = parts(rendered(cluster))
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    claims = [v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert [mounts[name] for name in claims] == ["/runs"]


def test_a_preempted_run_does_not_use_up_restarts(cluster):
    jobset = rendered(cluster)
    _, spec, _ = parts(jobset)
    codes = [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][1:]]
    assert codes == [[75]]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"


@pytest.mark.parametrize(
    ("kind", "hosts", "chips"), [("v5p:4x4x8", 32, 4), ("v6e:2x2", 1, 4), ("v5e:1x1", 1, 1)]
)
def test_hosts_follow_from_the_topology(cluster, kind, hosts, chips):
    _, spec, pod = parts(rendered(cluster, TPU_TYPE=kind))
    assert spec["parallelism"] == hosts
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_the_run_is_applied_and_followed_to_its_end(cluster):
    (cluster.folder / "states").write_text("\n\nCompleted")
    done = cluster.run(*RUN, **WHERE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the first host speaks") == 2
    applied = yaml.safe_load((cluster.folder / "applied.yaml").read_text())
    assert applied == rendered(cluster)
    look = ["get", "jobset", "saber", "-o", "jsonpath={.status.terminalState}"]
    ready = ["wait", "pod", f"--selector={POD}", "--for=condition=Ready", "--timeout=60s"]
    logs = ["logs", "--follow", f"--selector={POD}", "--tail=-1"]
    assert [call[1:] for call in cluster.calls("kubectl")] == [
        ["apply", "-f", "-"],
        *2 * [look, ready, logs],
        look,
    ]


def test_a_failed_jobset_is_a_failure(cluster):
    (cluster.folder / "states").write_text("Failed")
    assert cluster.run(*RUN, **WHERE).returncode == 1


def test_a_bucket_in_a_setting_is_refused_because_pods_see_it_through_their_volume(cluster):
    done = cluster.run(RUN[0], RUN[1], "--config.root=gs://runs/7b", **WHERE)
    assert done.returncode == 1 and "Make CLAIM a claim on it" in done.stderr
    assert not cluster.calls("kubectl")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"CLAIM": ""}, "CLAIM must be set"),
        ({"TPU_TYPE": "v9:2x2"}, "Generations: v4, v5e, v5p, v6e"),
        ({"TPU_TYPE": "v5p:16x16"}, "topologies of v5p have 3 numbers, got 16x16"),
        ({"SLICES": "two"}, "SLICES must be a whole number"),
        ({"NAME": "My_Run"}, "NAME must be small letters"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_applied(cluster, change, complaint):
    done = cluster.run(*RUN, **(WHERE | change))
    assert done.returncode == 1
    assert complaint in done.stderr
    assert not cluster.calls("kubectl")
