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
    shown = cluster.run("python3", "-m", "launch.gke", "--print", *RUN[1:], **(WHERE | change))
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
    ("kind", "hosts", "chips"),
    [("v5p:4x4x8", 32, 4), ("v6e:2x2", 1, 4), ("v5e:1x1", 1, 1), ("tpu7x:2x2x2", 2, 4)],
)
def test_hosts_follow_from_the_topology(cluster, kind, hosts, chips):
    _, spec, pod = parts(rendered(cluster, TPU_TYPE=kind))
    assert spec["parallelism"] == hosts
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def verbs(cluster):
    return [call[1] for call in cluster.calls("kubectl")]


def test_the_run_is_applied_and_followed_to_its_end(cluster):
    (cluster.folder / "states").write_text("\n\nCompleted")
    done = cluster.run(*RUN, **WHERE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the first host speaks") == 2
    applied = yaml.safe_load((cluster.folder / "applied.yaml").read_text())
    assert applied == rendered(cluster)
    look = ["get", "jobset", "saber", "-o", "json"]
    failed = [
        *("get", "pods", "--selector=jobset.sigs.k8s.io/jobset-name=saber"),
        *("--field-selector=status.phase=Failed", "-o"),
        'jsonpath={range .items[*]}{.metadata.name}{"\\n"}{end}',
    ]
    ready = ["wait", "pod", f"--selector={POD}", "--for=condition=Ready", "--timeout=60s"]
    logs = ["logs", "--follow", f"--selector={POD}", "--tail=-1"]
    assert [call[1:] for call in cluster.calls("kubectl")] == [
        look,
        ["apply", "-f", "-"],
        *2 * [look, failed, ready, logs],
        *(look, failed),
    ]


def test_a_cluster_that_does_not_answer_for_a_while_ends_nothing(cluster):
    (cluster.folder / "states").write_text("unavailable\nunavailable\n\nCompleted")
    done = cluster.run(*RUN, **WHERE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("JobSet saber: Completed\n")


def test_a_failed_jobset_is_a_failure_that_quotes_the_pods_that_failed(cluster):
    (cluster.folder / "states").write_text("\nFailed")
    (cluster.folder / "failed_pods").write_text("saber-slice-0-7-abcde")
    done = cluster.run(*RUN, **WHERE)
    assert done.returncode == 1
    assert done.stderr.count("saber-slice-0-7-abcde: out of memory") == 1
    assert ["logs", "saber-slice-0-7-abcde", "--tail=30"] in [
        call[1:] for call in cluster.calls("kubectl")
    ]


def test_the_same_command_starts_a_failed_jobset_again_and_joins_a_running_one(cluster):
    (cluster.folder / "states").write_text("Failed")
    assert cluster.run(*RUN, **WHERE).returncode == 1
    (cluster.folder / "states").write_text("Failed\n\nCompleted")
    done = cluster.run(*RUN, **WHERE)
    assert done.returncode == 0 and "Failed earlier; starting it again" in done.stdout
    assert verbs(cluster).count("delete") == 1 and verbs(cluster).count("apply") == 2

    (cluster.folder / "states").write_text("\n\nCompleted")
    done = cluster.run(*RUN, **WHERE)
    assert done.returncode == 0 and "looking on" in done.stdout
    assert verbs(cluster).count("apply") == 2


def test_other_settings_wait_for_a_running_jobset_and_replace_one_that_ended(cluster):
    (cluster.folder / "states").write_text("Completed")
    assert cluster.run(*RUN, **WHERE).returncode == 0
    (cluster.folder / "states").write_text("")
    done = cluster.run(*RUN, "--config.seed=2", **WHERE)
    assert done.returncode == 1 and "is running with other settings" in done.stderr
    (cluster.folder / "states").write_text("Completed")
    assert cluster.run(*RUN, "--config.seed=2", **WHERE).returncode == 0
    assert "--config.seed=2" in (cluster.folder / "applied.yaml").read_text()


def test_while_pods_wait_their_warnings_are_printed_once(cluster):
    (cluster.folder / "states").write_text("\n\n\nCompleted")
    (cluster.folder / "pending").write_text("2")
    (cluster.folder / "events").write_text(
        "saber-slice-0-0-x7k2p   FailedScheduling   0/3 nodes are available: google.com/tpu\n"
        "saber-slice-0-1-qqqqq   FailedScheduling   0/3 nodes are available: google.com/tpu\n"
        "another-0-0-x           Failed             something else\n"
    )
    done = cluster.run(*RUN, **WHERE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0/3 nodes are available: google.com/tpu") == 1
    assert "something else" not in done.stderr


def test_a_cluster_that_refuses_to_answer_is_quoted(cluster):
    (cluster.folder / "forbidden").touch()
    done = cluster.run(*RUN, **WHERE)
    assert done.returncode == 1 and "is forbidden" in done.stderr
    assert "apply" not in verbs(cluster)


def test_a_bucket_is_mounted_with_the_options_that_a_run_needs(cluster):
    jobset = rendered(cluster, CLAIM="", BUCKET="gs://runs-7b", SERVICE_ACCOUNT="trainer")
    (job,) = jobset["spec"]["replicatedJobs"]
    template = job["template"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert template["spec"]["serviceAccountName"] == "trainer"
    (volume,) = (v for v in template["spec"]["volumes"] if v["name"] == "runs")
    env = template["spec"]["containers"][0]["env"]
    assert env == [{"name": "SABER_MOUNTS", "value": "/runs=gs://runs-7b"}]
    assert volume["csi"] == {
        "driver": "gcsfuse.csi.storage.gke.io",
        "volumeAttributes": {
            "bucketName": "runs-7b",
            "mountOptions": "implicit-dirs,rename-dir-limit=1000000,metadata-cache:ttl-secs:0",
            "hostNetworkPodKSA": "true",
        },
    }


def test_a_run_in_a_bucket_needs_no_mount_and_acts_as_the_service_account(cluster):
    run = ("configs/cadpo.py:7b-v5e-256", "--config.root=gs://runs/7b")
    where = {"GKE_IMAGE": "registry/saber:1", "SERVICE_ACCOUNT": "trainer"}
    shown = cluster.run("python3", "-m", "launch.gke", "--print", *run, **where)
    jobset = yaml.safe_load(shown.stdout)
    jsonschema.Draft202012Validator(SCHEMA).validate(jobset)
    job, _, pod = parts(jobset)
    assert job["replicas"] == 1  # The recipe's.
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    annotations = job["template"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"gke-gcsfuse/volumes": "false"}
    assert not pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirst"
    assert pod["serviceAccountName"] == "trainer"
    assert pod["containers"][0]["command"] == ["launch/tpu_run.sh", *run]
    (volume,) = (v for v in pod["volumes"] if v["name"] == "runs")
    assert volume == {"name": "runs", "emptyDir": {}}


@pytest.mark.parametrize(("recipe", "slices"), [("7b-v5e-256", "2"), ("7b-2xv5e-128", "1")])
def test_slices_that_the_recipe_is_not_made_for_are_refused(cluster, recipe, slices):
    run = ("launch/tpu_run.sh", f"configs/cadpo.py:{recipe}", "--config.root=gs://runs/7b")
    done = cluster.run(*run, GKE_IMAGE="registry/saber:1", SLICES=slices)
    assert done.returncode == 1 and not cluster.calls("kubectl")
    assert f"SLICES is {slices}, but configs/cadpo.py:{recipe} is made for" in done.stderr


def test_several_slices_talk_over_the_network_of_their_nodes(cluster):
    _, _, pod = parts(rendered(cluster))
    assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"


def test_a_bucket_is_either_mounted_or_named_in_settings(cluster):
    done = cluster.run(RUN[0], RUN[1], "--config.root=gs://runs/7b", **(WHERE | {"BUCKET": "runs"}))
    assert done.returncode == 1 and "Leave BUCKET away" in done.stderr
    assert not cluster.calls("kubectl")


def test_a_run_is_stopped_by_its_name_alone(cluster):
    cluster.run("launch/tpu_run.sh", "--stop", GKE_IMAGE="registry/saber:1", NAME="mine")
    assert [call[1:] for call in cluster.calls("kubectl")] == [["delete", "jobset", "mine"]]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"CLAIM": ""}, "CLAIM or BUCKET must be set"),
        ({"TPU_TYPE": "v9:2x2"}, "Generations: v4, v5e, v5p, v6e, tpu7x"),
        ({"TPU_TYPE": "v5p:16x16"}, "topologies of v5p have 3 numbers, got 16x16"),
        ({"TPU_TYPE": ""}, "which TPUs?"),
        ({"TPU_TYPE": "2*v5e:16x16"}, "must be a generation and a topology"),
        ({"SLICES": "two"}, "SLICES must be a whole number"),
        ({"NAME": "My_Run"}, "NAME must be small letters"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_applied(cluster, change, complaint):
    done = cluster.run(*RUN, **(WHERE | change))
    assert done.returncode == 1
    assert complaint in done.stderr
    assert not cluster.calls("kubectl")
