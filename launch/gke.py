"""Runs a config on GKE as a JobSet, in kubectl's current context and namespace.

    GKE_IMAGE=IMAGE TPU_TYPE=v5e:16x16 SLICES=2 CLAIM=disk launch/tpu_run.sh configs/cadpo.py:7b

GKE_IMAGE   what launch/Dockerfile makes of this checkout
TPU_TYPE    generation and topology of one slice
SLICES      how many slices; 1 by default
CLAIM       persistent volume claim that all pods mount; the run's config.root is on it
NAME        of the JobSet, saber by default: the same name looks on at the same run

Applies launch/gke_jobset.yaml, prints what the first host prints, and exits 0 or 1 with the JobSet.
With --print it only shows what it would apply. Needs nothing but Python and kubectl.
"""

from __future__ import annotations  # A laptop's Python may be older than ours.

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

YAML = Path(__file__).resolve().parent / "gke_jobset.yaml"
# Generation -> what node pools call it. A host of any of them has four chips.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
CHIPS_PER_HOST = 4
DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
# The first host of the first slice.
LABELS = (
    "jobset.sigs.k8s.io/jobset-name={},jobset.sigs.k8s.io/job-index=0,"
    "batch.kubernetes.io/job-completion-index=0"
)


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    """What the YAML wants filled in, but for COMMAND. Exits with a sentence on what is wrong."""
    missing = [name for name in ("GKE_IMAGE", "TPU_TYPE", "CLAIM") if not environ.get(name)]
    if missing:
        sys.exit(
            f"launch/tpu_run.sh: on GKE, {' and '.join(missing)} must be set; see launch/gke.py."
        )
    generation, _, topology = environ["TPU_TYPE"].partition(":")
    sizes = topology.split("x")
    if generation not in ACCELERATORS or not all(re.fullmatch("[1-9][0-9]*", s) for s in sizes):
        sys.exit(
            f"launch/tpu_run.sh: TPU_TYPE must be a generation and a topology such as v5e:16x16 or "
            f"v5p:4x4x8, got {environ['TPU_TYPE']!r}. Generations: {', '.join(ACCELERATORS)}."
        )
    if len(sizes) != DIMENSIONS[generation]:
        sys.exit(
            f"launch/tpu_run.sh: topologies of {generation} have {DIMENSIONS[generation]} numbers, "
            f"got {topology}."
        )
    slices = environ.get("SLICES", "1")
    if not re.fullmatch("[1-9][0-9]*", slices):
        sys.exit(f"launch/tpu_run.sh: SLICES must be a whole number of slices, got {slices!r}.")
    chips = math.prod(map(int, sizes))
    hosts = max(1, chips // CHIPS_PER_HOST)
    name = environ.get("NAME", "saber")
    if not re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        sys.exit(
            "launch/tpu_run.sh: NAME must be small letters, digits and dashes, 40 at most, got "
            f"{name!r}."
        )
    return {
        "NAME": name,
        "IMAGE": environ["GKE_IMAGE"],
        "SLICES": slices,
        "HOSTS": str(hosts),
        "CHIPS": str(chips // hosts),
        "ACCELERATOR": ACCELERATORS[generation],
        "TOPOLOGY": topology,
        "CLAIM": environ["CLAIM"],
    }


def render(environ: Mapping[str, str], arguments: list[str]) -> str:
    """The YAML to apply: `arguments` are a config and its settings."""
    if buckets := [argument for argument in arguments if "gs://" in argument]:
        sys.exit(
            f"launch/tpu_run.sh: {buckets[0]}: pods see a bucket through their volume. Make CLAIM "
            "a claim on it (Cloud Storage FUSE), and give paths under /runs."
        )
    if not any(argument.startswith("--config.root=") for argument in arguments):
        variant = arguments[0].partition(":")[2] or "7b"
        arguments = [*arguments, f"--config.root=/runs/{variant}"]
    # JSON is YAML, whatever the arguments contain. Kubernetes would expand $(NAME) in them.
    literal = [argument.replace("$(", "$$(") for argument in arguments]
    command = json.dumps(["launch/tpu_run.sh", *literal])
    return Template(YAML.read_text()).substitute(settings(environ), COMMAND=command)


def kubectl(*arguments: str, **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run(["kubectl", *arguments], text=True, **options)


def terminal_state(name: str) -> str:
    """ "Completed", "Failed", or "" while it runs."""
    done = kubectl(
        "get", "jobset", name, "-o", "jsonpath={.status.terminalState}", capture_output=True
    )
    if done.returncode:
        sys.exit(f"launch/tpu_run.sh: JobSet {name} cannot be looked at: {done.stderr.strip()}")
    return done.stdout.strip()


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--print"]:
        print(render(os.environ, arguments[1:]))
        return 0
    if arguments == ["--stop"]:
        name = settings(os.environ)["NAME"]
        return kubectl("delete", "jobset", name).returncode
    name = settings(os.environ)["NAME"]
    if kubectl("apply", "-f", "-", input=render(os.environ, arguments)).returncode:
        return 1
    labels = LABELS.format(name)
    pause = os.environ.get("RECONNECT_SECONDS", "10")
    # The first host's pod comes and goes with restarts; its JobSet says when all is over.
    while not (state := terminal_state(name)):
        ready = kubectl(
            *("wait", "pod", f"--selector={labels}", "--for=condition=Ready", "--timeout=60s"),
            capture_output=True,
        )
        if ready.returncode == 0:
            kubectl("logs", "--follow", f"--selector={labels}", "--tail=-1")
        time.sleep(float(pause))
    print(f"JobSet {name}: {state}")
    return 0 if state == "Completed" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
