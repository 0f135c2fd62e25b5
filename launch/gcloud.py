"""All gcloud commands that the launchers run for TPU VMs and queued resources.

Needs only Python and gcloud. gcloud's error messages are printed, with advice for the common ones:
no quota, no capacity, no permission.
"""

from __future__ import annotations  # A laptop's Python may be older than ours.

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch import topology

FOLDER = "saber_jax"  # On the worker, under the home directory.
LOST = 255  # What ssh exits with when the connection breaks.
# Printed before each answer: gcloud writes what ssh itself says into the same file, and appends to
# it when it tries again.
MARK = "saber-jax-answer"
# A host that is gone is noticed within two minutes. TCP alone would take hours.
KEEPALIVE = ("ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=6")
API_TRIES = 6  # Over five minutes, see `_try`.

# Otherwise gcloud would wait for answers to prompts, for example about making an ssh key.
os.environ.setdefault("CLOUDSDK_CORE_DISABLE_PROMPTS", "1")

# What gcloud's message contains, and what a person can do about it.
NO_CAPACITY = (
    *("no more capacity", "RESOURCE_EXHAUSTED", "Insufficient capacity", "stockout"),
    *("resources exhausted", "ZONE_RESOURCE_POOL_EXHAUSTED"),
)
NO_QUOTA = ("Quota limit", "QUOTA_EXCEEDED", "Quota exceeded")
EXISTS = ("ALREADY_EXISTS", "already exists")
NOT_THERE = ("NOT_FOUND", "not found")
ADVICE = {
    NO_QUOTA: (
        "The project may not have that many chips of this kind here. Ask for quota (console, IAM & "
        "Admin, Quotas, `TPU`), take a smaller slice, or try --spot, which has a quota of its own."
    ),
    NO_CAPACITY: (
        "There are no such TPUs free in this zone now. Try another zone, --spot, or "
        "launch/pod.sh watch, which goes on asking."
    ),
    EXISTS: (
        "It exists already. Use it with launch/pod.sh run, or delete it with launch/pod.sh delete."
    ),
    ("PERMISSION_DENIED", "does not have permission"): (
        "This account may not do that here. It needs the role roles/tpu.admin in the project, and "
        "the TPU API must be enabled: gcloud services enable tpu.googleapis.com"
    ),
}
# After these another try is no use. Those of `REFUSALS` may mean too many requests a minute where
# nothing was asked for but a look.
FINAL = (
    *("PERMISSION_DENIED", "INVALID_ARGUMENT", "UNAUTHENTICATED", "does not have permission"),
    *("unrecognized arguments", *NOT_THERE),
)
REFUSALS = (*FINAL, *NO_CAPACITY, *NO_QUOTA, *EXISTS)


class Refused(Exception):
    """gcloud refused. `no_capacity` says whether asking again later may help."""

    def __init__(self, command: Sequence[str], said: str):
        advice = next((a for words, a in ADVICE.items() if any(w in said for w in words)), "")
        super().__init__(f"{shlex.join(command)} failed:\n{said.strip()}\n{advice}".rstrip())
        self.no_capacity = any(word in said for word in NO_CAPACITY)


@dataclasses.dataclass(frozen=True)
class Node:
    """One slice: a TPU VM of `workers` hosts. `kind` is its accelerator type."""

    name: str
    workers: int
    kind: str = ""

    @property
    def hosts(self) -> list[tuple[str, int]]:
        """All its workers, as (name, index)."""
        return [(self.name, worker) for worker in range(self.workers)]


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
        done, _ = _try([*command, "--format=json"], FINAL)
        if done.returncode == 0:
            return json.loads(done.stdout)
        if any(word in done.stderr for word in NOT_THERE):
            return None
        raise Refused(command, done.stderr)

    def create(self, shape: topology.Slices, *, spot: bool, disk: str = "") -> None:
        """Asks for the slices as a queued resource, which waits until they are free.

        `disk` names a disk of the same zone that is attached to every worker for reading. Raises
        Refused.
        """
        about = topology.GENERATIONS[shape.generation]
        many = [f"--node-count={shape.count}", f"--node-prefix={self.name}"]
        source = f"projects/{self.project}/zones/{self.zone}/disks/{disk}"
        self._do(
            *("queued-resources", "create", self.name),
            *(many if shape.count > 1 else [f"--node-id={self.name}"]),
            f"--accelerator-type={shape.accelerator_type}",
            f"--runtime-version={about.runtime}",
            *(["--spot"] if spot else []),
            *([f"--data-disk=source={source},mode=read-only"] if disk else []),
        )

    def delete(self) -> bool:
        """Deletes the queued resource with its TPU VMs, or else the TPU VM; False when there is
        neither. Raises Refused."""
        if self.describe("queued-resources", self.name) is not None:
            self._do("queued-resources", "delete", self.name, "--force", "--quiet")
            return True
        if self.describe("tpu-vm", self.name) is not None:
            self._do("tpu-vm", "delete", self.name, "--quiet")
            return True
        return False

    def _do(self, kind: str, verb: str, name: str, *flags: str) -> None:
        command = ["gcloud", "compute", "tpus", kind, verb, name, *self._where(), *flags]
        done, tries = _try(command, REFUSALS)
        # An earlier try may have worked though its answer was lost.
        worked = {"create": EXISTS, "delete": NOT_THERE}[verb]
        repeated = tries > 1 and any(word in done.stderr for word in worked)
        if done.returncode and not repeated:
            raise Refused(command, done.stderr)

    def state(self) -> str:
        """The state of the pod: READY, PREEMPTED, MISSING, or the state of its queued resource or
        TPU VM, such as WAITING_FOR_RESOURCES."""
        resource = self.describe("queued-resources", self.name)
        if resource is not None:
            word = resource.get("state", {}).get("state", "unknown")
            if word == "SUSPENDED":  # Its TPU VMs were taken back.
                return "PREEMPTED"
            if word != "ACTIVE":
                return word
            names = node_names(self.name, resource)
        else:
            names = [self.name]
        machines = [self.describe("tpu-vm", name) for name in names]
        words = [m.get("state", "unknown") if m else "MISSING" for m in machines]
        return next((word for word in words if word != "READY"), "READY")

    def nodes(self) -> list[Node]:
        """The slices, all READY. Exits with a message otherwise."""
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
        names = node_names(self.name, resource)
        return [self._node(name, self.describe("tpu-vm", name)) for name in names]

    def _node(self, name: str, machine: dict[str, Any] | None) -> Node:
        if machine is None or machine.get("state") != "READY":
            state = machine.get("state", "in no known state") if machine else "missing"
            sys.exit(f"launch/tpu_run.sh: TPU VM {name} is {state}, not READY.")
        return Node(name, len(machine["networkEndpoints"]), machine.get("acceleratorType", ""))

    def copy(self, node: Node, source: Path) -> int:
        command = ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(source)]
        return subprocess.run(
            [
                *(*command, f"{node.name}:{FOLDER}.tar.gz", "--worker=all", *self._where()),
                *(f"--scp-flag=-o{option}" for option in KEEPALIVE),
            ],
            stdout=subprocess.DEVNULL,
        ).returncode

    def on_all(self, node: Node, command: str) -> tuple[int, dict[int, str]]:
        """(status of ssh, {worker: what `command` printed there}). A worker that `command` did not
        reach is missing; what ssh said about it is printed."""
        with tempfile.TemporaryDirectory() as out:
            # gcloud (528) checks --output-directory and then writes to the folder `None` of the
            # working directory. A version that does not is served as well.
            (Path(out) / "None").mkdir()
            status = subprocess.run(
                [*self._ssh(node, "all", f"echo {MARK}; {command}"), f"--output-directory={out}"],
                stdout=subprocess.DEVNULL,
                cwd=out,
            ).returncode
            # Named after the worker, whatever else stands in the name.
            said = {
                int(re.findall(r"\d+", p.stem)[-1]): p.read_text(errors="replace")
                for p in Path(out).rglob("*.log")
            }
        answers = {worker: text.split(f"{MARK}\n")[1:] for worker, text in said.items()}
        for worker in sorted(worker for worker, tries in answers.items() if not tries):
            why = said[worker].strip().rpartition("\n")[2] or "nothing"
            print(f"{node.name} worker {worker} is not reached; ssh says: {why}", file=sys.stderr)
        return status, {worker: tries[-1].strip() for worker, tries in answers.items() if tries}

    def watch(self, node: Node) -> tuple[int, bool]:
        """Prints worker 0's output; (status of the connection, whether it brought any output)."""
        command = self._ssh(node, "0", f"cd {FOLDER} && launch/job.sh follow")
        heard = False
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                # Not by lines: those of a progress bar do not end.
                while piece := os.read(process.stdout.fileno(), 2**16):
                    heard = True
                    sys.stdout.buffer.write(piece)
                    sys.stdout.buffer.flush()
            except BaseException:
                process.kill()
                raise
        return process.returncode, heard

    def _ssh(self, node: Node, worker: str, command: str) -> list[str]:
        return [
            *("gcloud", "compute", "tpus", "tpu-vm", "ssh", node.name),
            *(f"--worker={worker}", *self._where(), f"--command={command}"),
            *(f"--ssh-flag=-o{option}" for option in KEEPALIVE),
        ]


def _try(command: Sequence[str], final: Sequence[str]) -> tuple[subprocess.CompletedProcess, int]:
    """(the last try, how many there were). A watch takes days, and the API may fail for minutes;
    `final` are words of errors that another try does not help."""
    for number in range(API_TRIES):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 or any(word in done.stderr for word in final):
            return done, number + 1
        if number + 1 < API_TRIES:
            time.sleep(pause() * 2**number)
    return done, API_TRIES


def node_names(name: str, resource: dict[str, Any]) -> list[str]:
    """The TPU VMs of the queued resource called `name`."""
    names = []
    for spec in resource["tpu"]["nodeSpec"]:
        many = spec.get("multisliceParams") or spec.get("multiNodeParams")
        if many:
            prefix = many.get("nodeIdPrefix") or name
            names += [f"{prefix}-{i}" for i in range(int(many["nodeCount"]))]
        else:
            names.append(spec["nodeId"])
    return names


def from_environment() -> Pod:
    """TPU_NAME in ZONE of PROJECT. Exits with a sentence on what is missing."""
    missing = [name for name in ("TPU_NAME", "ZONE", "PROJECT") if not os.environ.get(name)]
    if missing:
        sys.exit(
            f"launch/tpu_run.sh: {' and '.join(missing)} not set. To run on a TPU elsewhere, set "
            "TPU_NAME, ZONE and PROJECT; to run here, unset TPU_NAME."
        )
    return Pod(os.environ["TPU_NAME"], os.environ["ZONE"], os.environ["PROJECT"])


def pause() -> float:
    """Seconds between two tries."""
    return float(os.environ.get("RECONNECT_SECONDS", "10"))


def everywhere(nodes: list[Node], do: Callable[[Node], Any]) -> list:
    """do(node) for all nodes at a time; results in order."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(do, nodes))


def ask(pod: Pod, nodes: list[Node], command: str) -> dict[tuple[str, int], str]:
    """{(node, worker): answer}; a worker that does not answer is missing."""
    answers = everywhere(nodes, lambda node: pod.on_all(node, command)[1])
    return {
        (nodes[i].name, worker): text
        for i, said in enumerate(answers)
        for worker, text in said.items()
    }


def named(workers: Sequence[tuple[str, int]]) -> str:
    """The first of these workers by name, and how many more there are."""
    first = ", ".join(f"{name} worker {worker}" for name, worker in workers[:3])
    return first + (f" and {len(workers) - 3} more" if len(workers) > 3 else "")
