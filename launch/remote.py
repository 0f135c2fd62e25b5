"""Runs a config on all workers of a TPU VM, or of the nodes of a queued resource, with gcloud.

    TPU_NAME=my-pod ZONE=us-west4-a PROJECT=my-project launch/tpu_run.sh configs/cadpo.py:7b

Copies this checkout to every worker, starts launch/job.sh there, prints what worker 0 prints, and
exits with the worst worker's status. The run does not need this computer: after a lost connection
or Ctrl-C it goes on, and the same command looks on again. Needs nothing but Python and gcloud.
"""

from __future__ import annotations  # A laptop's Python may be older than ours.

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "saber_jax"  # On the worker, under the home directory.
LOST = 255  # What ssh exits with when the connection breaks.
PREEMPTED = 75
RECONNECTS = 20


@dataclasses.dataclass(frozen=True)
class Node:
    """One slice: a TPU VM of `workers` hosts."""

    name: str
    workers: int


@dataclasses.dataclass(frozen=True)
class Pod:
    """Every gcloud command line that this file issues."""

    name: str
    zone: str
    project: str

    def _where(self) -> list[str]:
        return [f"--zone={self.zone}", f"--project={self.project}"]

    def describe(self, kind: str, name: str) -> dict[str, Any] | None:
        """`kind` is tpu-vm or queued-resources. None when there is none of that name."""
        command = ["gcloud", "compute", "tpus", kind, "describe", name, *self._where()]
        done = subprocess.run([*command, "--format=json"], capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout)
        if "NOT_FOUND" in done.stderr or "not found" in done.stderr:
            return None
        sys.exit(f"launch/tpu_run.sh: {shlex.join(command)} failed:\n{done.stderr.strip()}")

    def nodes(self) -> list[Node]:
        """The slices, all ready. Exits with a sentence when there are none."""
        machine = self.describe("tpu-vm", self.name)
        if machine is not None:
            return [self._node(self.name, machine)]
        resource = self.describe("queued-resources", self.name)
        if resource is None:
            sys.exit(
                f"launch/tpu_run.sh: {self.project} has no TPU VM and no queued resource named "
                f"{self.name!r} in {self.zone}."
            )
        state = resource.get("state", {}).get("state", "unknown")
        if state != "ACTIVE":
            sys.exit(
                f"launch/tpu_run.sh: queued resource {self.name} is {state}, not ACTIVE; its TPUs "
                "are not there yet. Start this again when they are."
            )
        names = []
        for spec in resource["tpu"]["nodeSpec"]:
            many = spec.get("multisliceParams") or spec.get("multiNodeParams")
            if many:
                prefix = many.get("nodeIdPrefix") or self.name
                names += [f"{prefix}-{i}" for i in range(int(many["nodeCount"]))]
            else:
                names.append(spec["nodeId"])
        return [self._node(name, self.describe("tpu-vm", name)) for name in names]

    def _node(self, name: str, machine: dict[str, Any] | None) -> Node:
        if machine is None or machine.get("state") != "READY":
            state = machine.get("state", "in no known state") if machine else "missing"
            sys.exit(f"launch/tpu_run.sh: TPU VM {name} is {state}, not READY.")
        return Node(name, len(machine["networkEndpoints"]))

    def copy(self, node: Node, source: Path) -> int:
        command = ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(source)]
        return subprocess.run(
            [*command, f"{node.name}:{FOLDER}.tar.gz", "--worker=all", *self._where()],
            stdout=subprocess.DEVNULL,
        ).returncode

    def on_all(self, node: Node, command: str) -> tuple[int, dict[int, str]]:
        """(status of ssh, {worker: what `command` printed there})."""
        with tempfile.TemporaryDirectory() as out:
            status = subprocess.run(
                [*self._ssh(node, "all", command), f"--output-directory={out}"],
                stdout=subprocess.DEVNULL,
            ).returncode
            # Named after the worker, whatever else stands in the name.
            said = {
                int(re.findall(r"\d+", p.stem)[-1]): p.read_text() for p in Path(out).rglob("*.log")
            }
        return status, said

    def watch(self, node: Node) -> int:
        """Passes worker 0's output on; returns the status of the connection."""
        return subprocess.run(
            self._ssh(node, "0", f"cd {FOLDER} && launch/job.sh follow")
        ).returncode

    def _ssh(self, node: Node, worker: str, command: str) -> list[str]:
        return [
            *("gcloud", "compute", "tpus", "tpu-vm", "ssh", node.name),
            *(f"--worker={worker}", *self._where(), f"--command={command}"),
        ]


def pack(target: Path) -> None:
    """This checkout, as it is: tracked files and new ones that git does not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    with tarfile.open(target, "w:gz") as tar:
        for name in sorted(set(filter(None, listing.split("\0")))):
            if (ROOT / name).exists():
                tar.add(ROOT / name, arcname=name, recursive=False)


def everywhere(nodes: list[Node], do: Callable[[Node], Any]) -> list:
    """do(node) for all nodes at a time; results in order."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(do, nodes))


def ask(pod: Pod, nodes: list[Node], command: str) -> dict[tuple[str, int], str]:
    """{(node, worker): answer}; a worker that does not answer is missing."""
    answers = everywhere(nodes, lambda node: pod.on_all(node, command)[1])
    return {
        (nodes[i].name, worker): text.strip()
        for i, said in enumerate(answers)
        for worker, text in said.items()
    }


def start(pod: Pod, nodes: list[Node], arguments: list[str]) -> None:
    """Copies and starts on all workers. Exits when any of them cannot."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / f"{FOLDER}.tar.gz"
        pack(archive)
        size = archive.stat().st_size / 2**20
        print(f"copying this checkout ({size:.1f} MiB) to {where(nodes)}", flush=True)
        if any(everywhere(nodes, lambda node: pod.copy(node, archive))):
            sys.exit("launch/tpu_run.sh: copying failed, see above.")
    run = shlex.join(["launch/job.sh", "start", *arguments])
    unpack = f"mkdir -p {FOLDER} && tar -xzf {FOLDER}.tar.gz -C {FOLDER}"
    statuses = everywhere(
        nodes, lambda node: pod.on_all(node, f"{unpack} && cd {FOLDER} && {run}")[0]
    )
    if any(statuses):
        ask(pod, nodes, f"cd {FOLDER} && launch/job.sh stop")
        sys.exit(
            "launch/tpu_run.sh: not every worker could start, see above; the rest were stopped."
        )


def follow(pod: Pod, node: Node) -> None:
    """Until worker 0 has ended, through lost connections."""
    for _ in range(RECONNECTS):
        if pod.watch(node) != LOST:
            return
        print("launch/tpu_run.sh: connection lost, the run goes on; connecting again", flush=True)
        time.sleep(float(os.environ.get("RECONNECT_SECONDS", "10")))
    sys.exit(f"launch/tpu_run.sh: no connection to {node.name}. The run goes on without us.")


def verdict(nodes: list[Node], answers: dict[tuple[str, int], str]) -> int:
    """The worst worker's status, and a line for each worker that did not end well."""
    statuses = []
    for node in nodes:
        for worker in range(node.workers):
            answer = answers.get((node.name, worker), "")
            match = re.match(r"exit (\d+)", answer)
            statuses.append(int(match[1]) if match else 1)
            if statuses[-1]:
                why = answer.partition("\n")[2] if match else "it did not answer"
                said = f"{node.name} worker {worker} ended with status {statuses[-1]}"
                print(f"\n{said}:\n{why}", file=sys.stderr)
    # Having been told to stop is the mildest way not to succeed.
    failures = [status for status in statuses if status not in (0, PREEMPTED)]
    return max(failures, default=max(statuses))


def where(nodes: list[Node]) -> str:
    return ", ".join(f"{node.name} ({node.workers} workers)" for node in nodes)


def main(arguments: list[str]) -> int:
    missing = [name for name in ("TPU_NAME", "ZONE", "PROJECT") if not os.environ.get(name)]
    if missing:
        sys.exit(
            f"launch/tpu_run.sh: {' and '.join(missing)} not set. To run on a TPU elsewhere, set "
            "TPU_NAME, ZONE and PROJECT; to run here, unset TPU_NAME."
        )
    pod = Pod(os.environ["TPU_NAME"], os.environ["ZONE"], os.environ["PROJECT"])
    nodes = pod.nodes()
    if arguments == ["--stop"]:
        ask(pod, nodes, f"cd {FOLDER} && launch/job.sh stop")
        print("told to stop; the command that started it shows how it ends")
        return 0
    states = ask(pod, nodes, f"test -d {FOLDER} && cd {FOLDER} && launch/job.sh state || echo none")
    if any(state == "running" for state in states.values()):
        print(f"a run is going on on {where(nodes)}; looking on", flush=True)
    else:
        start(pod, nodes, arguments)
    try:
        follow(pod, nodes[0])
    except KeyboardInterrupt:
        sys.exit(
            "\nlaunch/tpu_run.sh: the run goes on. The same command looks on again; with --stop in "
            "place of the config it is told to save and end."
        )
    status = verdict(nodes, ask(pod, nodes, f"cd {FOLDER} && launch/job.sh end"))
    ending = f"the worst worker ended with status {status}" if status else "done"
    print(f"{where(nodes)}: {ending}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
