"""Runs a config on GKE as a JobSet, in kubectl's current context and namespace.

    GKE_IMAGE=IMAGE TPU_TYPE=v5e:16x16 SERVICE_ACCOUNT=trainer launch/tpu_run.sh \
        configs/cadpo.py:7b-v5e-256 --config.root=gs://BUCKET/7b

GKE_IMAGE        the image built with launch/Dockerfile from this checkout
TPU_TYPE         generation and topology of one slice, by default those of the recipe
SLICES           how many slices, by default as many as the recipe has, or 1
CLAIM or BUCKET  instead of a gs:// root: a persistent volume claim that many pods may mount, or a
                 Cloud Storage bucket to mount with FUSE, on /runs; the run's config.root is there
SERVICE_ACCOUNT  Kubernetes service account of the pods, "default" by default; it must be allowed
                 to write to the bucket. With several slices, the node pools' service account must
                 be allowed to as well: pods are then on the network of their nodes, where requests
                 are made in the node's name (docs/pod.md)
NAME             name of the JobSet, saber by default; the same name attaches to the same run

Applies launch/gke_jobset.yaml, prints the first host's output, and exits with 0 or 1 like the
JobSet. It prints why pods are pending, and the last lines of failed pods. The same command starts a
failed JobSet again. With --print it only shows what it would apply. Needs only Python and kubectl.
"""

from __future__ import annotations  # A laptop's Python may be older than ours.

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from launch import topology
from launch.gcloud import pause

YAML = Path(__file__).resolve().parent / "gke_jobset.yaml"
# Pods of the JobSet, and among them the first host of the first slice.
PODS = "jobset.sigs.k8s.io/jobset-name={}"
FIRST = f"{PODS},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
SPEC = "saber-jax/spec"
LAST_LINES = 30
# Ten minutes and more: a zonal cluster does not answer while its control plane is upgraded.
LOOK_TRIES = 60
# Mount options of Cloud Storage FUSE: implicit folders, renaming of whole folders, and no metadata
# cache, because other hosts may replace files.
MOUNT_OPTIONS = "implicit-dirs,rename-dir-limit=1000000,metadata-cache:ttl-secs:0"
POD_NETWORK = {"HOST_NETWORK": "false", "DNS_POLICY": "ClusterFirst"}
NODE_NETWORK = {"HOST_NETWORK": "true", "DNS_POLICY": "ClusterFirstWithHostNet"}


def name_of(environ: Mapping[str, str]) -> str:
    """The name of the JobSet. Exits with a message if Kubernetes would refuse it."""
    name = environ.get("NAME", "saber")
    if not re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        sys.exit(
            "launch/tpu_run.sh: NAME must be small letters, digits and dashes, 40 at most, got "
            f"{name!r}."
        )
    return name


def settings(environ: Mapping[str, str], config: str) -> dict[str, str]:
    """The values of the YAML template except COMMAND. Exits with a message if one is wrong."""
    if not environ.get("GKE_IMAGE"):
        sys.exit("launch/tpu_run.sh: on GKE, GKE_IMAGE must be set; see launch/gke.py.")
    slices = environ.get("SLICES", "")
    if slices and not re.fullmatch("[1-9][0-9]*", slices):
        sys.exit(f"launch/tpu_run.sh: SLICES must be a whole number of slices, got {slices!r}.")
    asked = environ.get("TPU_TYPE", "")
    if asked and slices:
        asked = f"{slices}*{asked}"
    try:
        shape = topology.wanted(config, asked)
    except ValueError as error:
        sys.exit(f"launch/tpu_run.sh: {error}")
    if slices and int(slices) != shape.count:  # Without TPU_TYPE the shape is the recipe's.
        sys.exit(
            f"launch/tpu_run.sh: SLICES is {slices}, but {config} is made for {shape}. Leave "
            "SLICES away, or choose another recipe (configs/pods.py)."
        )
    bucket = environ.get("BUCKET", "").removeprefix("gs://").rstrip("/")
    return {
        "NAME": name_of(environ),
        "IMAGE": environ["GKE_IMAGE"],
        "SLICES": str(shape.count),
        "HOSTS": str(shape.hosts),
        "CHIPS": str(shape.chips // shape.hosts),
        "ACCELERATOR": topology.GENERATIONS[shape.generation].node_pool,
        "TOPOLOGY": shape.topology,
        "SERVICE_ACCOUNT": environ.get("SERVICE_ACCOUNT") or "default",
        # Traffic between slices is faster on the network of the nodes. Only pods on a network of
        # their own can act as their service account, so one slice stays there.
        **(NODE_NETWORK if shape.count > 1 else POD_NETWORK),
        "FUSE": json.dumps("true" if bucket else "false"),
        "VOLUME": json.dumps(_volume(bucket, environ.get("CLAIM", "")))[1:-1],
        "MOUNTS": json.dumps(f"/runs=gs://{bucket}" if bucket else ""),
    }


def _volume(bucket: str, claim: str) -> dict[str, Any]:
    """The source of the volume on /runs: what all pods share, or a pod's own disk space if the run
    is in a bucket that is not mounted."""
    if not bucket:
        return {"persistentVolumeClaim": {"claimName": claim}} if claim else {"emptyDir": {}}
    attributes = {
        "bucketName": bucket,
        "mountOptions": MOUNT_OPTIONS,
        # On the node's network, the driver finds the pod's service account only with this option.
        "hostNetworkPodKSA": "true",
    }
    return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}


def render(environ: Mapping[str, str], arguments: list[str]) -> str:
    """The YAML to apply: `arguments` are a config and its settings. Exits with a message if the run
    would leave its results in a pod."""
    filled = settings(environ, arguments[0])
    roots = [a.partition("=")[2] for a in arguments if a.startswith("--config.root=")]
    shared = environ.get("CLAIM") or environ.get("BUCKET")
    if not shared and not any(root.startswith("gs://") for root in roots[-1:]):
        sys.exit(
            "launch/tpu_run.sh: on GKE, --config.root=gs://BUCKET/PATH, CLAIM or BUCKET must be "
            "set: a run's folder has to outlive its pods. See launch/gke.py."
        )
    if environ.get("BUCKET") and (own := [a for a in arguments if "gs://" in a]):
        sys.exit(
            f"launch/tpu_run.sh: {own[0]} names a bucket, and BUCKET mounts one on /runs. Leave "
            "BUCKET away, which is faster, or give paths under /runs."
        )
    if not roots:
        variant = arguments[0].partition(":")[2] or "7b"
        arguments = [*arguments, f"--config.root=/runs/{variant}"]
    # JSON is YAML, whatever the arguments contain. Kubernetes would expand $(NAME) in them.
    literal = [argument.replace("$(", "$$(") for argument in arguments]
    filled |= {"COMMAND": json.dumps(["launch/tpu_run.sh", *literal])}
    spec = hashlib.sha256(json.dumps([filled, YAML.read_text()]).encode()).hexdigest()[:16]
    return Template(YAML.read_text()).substitute(filled, SPEC=spec)


def kubectl(*arguments: str, **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run(["kubectl", *arguments], text=True, **options)


def look(name: str, tries: int = 1) -> dict[str, Any] | None:
    """The JobSet as the cluster has it; None when there is none of that name. Exits with a message
    when the cluster does not answer `tries` times."""
    for number in range(1, tries + 1):
        done = kubectl("get", "jobset", name, "-o", "json", capture_output=True)
        if done.returncode == 0:
            return json.loads(done.stdout)
        if "NotFound" in done.stderr or "not found" in done.stderr:
            return None
        if number == tries or "Forbidden" in done.stderr:
            break
        time.sleep(pause())
    sys.exit(f"launch/tpu_run.sh: JobSet {name} cannot be looked at: {done.stderr.strip()}")


def terminal_state(jobset: dict[str, Any]) -> str:
    """ "Completed", "Failed", or "" while it runs."""
    return jobset.get("status", {}).get("terminalState", "")


def make_room(name: str, rendered: str) -> bool:
    """Whether the JobSet has to be applied. One that failed, or was completed with other settings,
    is deleted first: Kubernetes refuses to change its jobs. Exits when another one is running."""
    jobset = look(name)
    if jobset is None:
        return True
    state = terminal_state(jobset)
    same = jobset["metadata"].get("annotations", {}).get(SPEC, "") in rendered.split('"')
    if state == "Completed" and same:
        return False
    if not state and same:
        print(f"JobSet {name} is there; looking on", flush=True)
        return False
    if not state:
        sys.exit(
            f"launch/tpu_run.sh: JobSet {name} is running with other settings, and a JobSet cannot "
            "be changed. End it with launch/tpu_run.sh --stop, or give this run another NAME."
        )
    print(f"JobSet {name}: {state} earlier; starting it again", flush=True)
    if kubectl("delete", "jobset", name, "--wait=true").returncode:
        sys.exit(f"launch/tpu_run.sh: JobSet {name} could not be deleted, see above.")
    return True


def log_why_it_waits(name: str, said: set[str]) -> None:
    """Prints warnings about the JobSet's pods that were not printed before: no node pool with these
    TPUs, an image that cannot be pulled, a volume that cannot be mounted."""
    columns = "custom-columns=POD:.involvedObject.name,REASON:.reason,MESSAGE:.message"
    done = kubectl(
        *("get", "events", "--field-selector=type=Warning", "--no-headers", "-o", columns),
        capture_output=True,
    )
    warnings: dict[str, str] = {}
    for line in done.stdout.splitlines():
        pod, _, warning = line.strip().partition(" ")
        # All hosts have the same problem, so one message is enough.
        if pod.startswith(f"{name}-"):
            warnings.setdefault(warning.strip(), pod)
    for warning, pod in warnings.items():
        if warning not in said:
            said.add(warning)
            print(f"waiting: {pod}: {warning}", file=sys.stderr, flush=True)


def quote_failures(name: str, said: set[str]) -> None:
    """Prints the last lines of pods that failed, each once: a restart deletes them with their
    logs."""
    each = '{range .items[*]}{.metadata.name}{"\\n"}{end}'
    done = kubectl(
        *("get", "pods", f"--selector={PODS.format(name)}", "--field-selector=status.phase=Failed"),
        *("-o", f"jsonpath={each}"),
        capture_output=True,
    )
    for pod in done.stdout.split():
        if pod not in said:
            said.add(pod)
            print(f"\npod {pod} failed; it said last:", file=sys.stderr, flush=True)
            kubectl("logs", pod, f"--tail={LAST_LINES}", stdout=sys.stderr)


def follow(name: str) -> str:
    """Prints what the first host prints until the JobSet has ended; returns how it did.

    The first host's pod comes and goes with restarts; the JobSet says when all is over.
    """
    waited_for: set[str] = set()
    failed: set[str] = set()
    first = FIRST.format(name)
    while True:
        jobset = look(name, LOOK_TRIES)
        if jobset is None:
            return "deleted"
        quote_failures(name, failed)
        if state := terminal_state(jobset):
            return state
        ready = kubectl(
            *("wait", "pod", f"--selector={first}", "--for=condition=Ready", "--timeout=60s"),
            capture_output=True,
        )
        if ready.returncode == 0:
            kubectl("logs", "--follow", f"--selector={first}", "--tail=-1")
        else:
            log_why_it_waits(name, waited_for)
        time.sleep(pause())


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--print"]:
        print(render(os.environ, arguments[1:]))
        return 0
    name = name_of(os.environ)
    if arguments == ["--stop"]:
        return kubectl("delete", "jobset", name).returncode
    rendered = render(os.environ, arguments)
    if make_room(name, rendered) and kubectl("apply", "-f", "-", input=rendered).returncode:
        return 1
    state = follow(name)
    print(f"JobSet {name}: {state}")
    return 0 if state == "Completed" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
