"""Runs a config on all workers of a TPU VM, or of the nodes of a queued resource, with gcloud.

    TPU_NAME=my-pod ZONE=us-west4-a PROJECT=my-project launch/tpu_run.sh configs/cadpo.py:7b

Copies this checkout to every worker, starts launch/job.sh there, prints worker 0's output, and
exits with the worst worker's status. The run does not depend on this computer: it continues after a
lost connection or Ctrl-C, and the same command attaches to it again. Needs only Python and gcloud.
"""

from __future__ import annotations  # A laptop's Python may be older than ours.

import os
import re
import secrets
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from launch import gcloud, topology
from launch.gcloud import FOLDER, LOST, Node, Pod, ask, everywhere

ROOT = Path(__file__).resolve().parent.parent
PREEMPTED = 75
INTERRUPTED = 130
UNPACK = f"mkdir -p {FOLDER} && tar -xzf {FOLDER}.tar.gz -C {FOLDER} && cd {FOLDER}"
# Both say "none" where nothing was ever started.
STATE, STOP = (
    f"test -d {FOLDER} && cd {FOLDER} && launch/job.sh {verb} || echo none"
    for verb in ("state", "stop")
)
RECONNECTS = 10  # Each of them is ten of gcloud's.


class Unreached(Exception):
    """Workers cannot be reached, so nothing is known about the run there: it may go on. `heard`
    says whether worker 0 was reached before."""

    def __init__(self, text: str, *, heard: bool = False):
        super().__init__(text)
        self.heard = heard


class OtherTpus(Exception):
    """The TPUs that are there are not those that the run is made for."""


def pack(target: Path) -> None:
    """Packs this checkout: tracked files and new ones that git does not ignore."""
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


def ship(pod: Pod, nodes: list[Node]) -> None:
    """Copies this checkout to all workers, to be unpacked there. Exits when that fails."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / f"{FOLDER}.tar.gz"
        pack(archive)
        size = archive.stat().st_size / 2**20
        print(f"copying this checkout ({size:.1f} MiB) to {where(nodes)}", flush=True)
        if any(everywhere(nodes, lambda node: pod.copy(node, archive))):
            sys.exit("launch/tpu_run.sh: copying failed, see above.")


def start(pod: Pod, nodes: list[Node], arguments: list[str]) -> None:
    """Copies and starts on all workers. Exits when any of them cannot."""
    ship(pod, nodes)
    job = secrets.token_hex(4)
    run = f"JOB_ID={job} {shlex.join(['launch/job.sh', 'start', *arguments])}"
    # gcloud repeats a command whose connection broke, and somebody else may have been faster. The
    # checkout of a run that goes on must stay as it is.
    first = f'if [ "$({STATE})" = running ]; then echo running'
    answers = ask(pod, nodes, f"{first}; else {UNPACK} && {run} && echo started; fi")
    began = {who for who, said in answers.items() if re.search(r"(?m)^(started|running)$", said)}
    if failed := [who for node in nodes for who in node.hosts if who not in began]:
        for who in failed:
            print(f"\n{gcloud.named([who])}:\n{answers.get(who, '')}", file=sys.stderr)
        ask(pod, nodes, f"cd {FOLDER} && launch/job.sh stop {job}")
        sys.exit(
            f"launch/tpu_run.sh: {gcloud.named(failed)} could not start, see above; those that did "
            "were stopped."
        )


def follow(pod: Pod, node: Node) -> None:
    """Prints worker 0's output until it ends. Reconnects after lost connections, and gives up after
    RECONNECTS in a row that brought no output. Raises Unreached then."""
    failures, ever = 0, False
    while failures < RECONNECTS:
        status, heard = pod.watch(node)
        ever = ever or heard
        # Without output, another status than LOST is of gcloud, which could not ask the API.
        if status == 0 or (heard and status != LOST):
            return
        # gcloud tries each time for minutes, so time says nothing about the connection.
        failures = 0 if heard else failures + 1
        print("launch/tpu_run.sh: connection lost, the run goes on; connecting again", flush=True)
        time.sleep(gcloud.pause())
    raise Unreached(f"no connection to {node.name}. The run goes on without us.", heard=ever)


def verdict(nodes: list[Node], answers: dict[tuple[str, int], str]) -> int:
    """The worst worker's status, and a line for each worker that did not end well."""
    statuses = []
    for who in (who for node in nodes for who in node.hosts):
        answer = answers.get(who, "")
        match = re.search(r"(?m)^exit (\d+)$", answer)
        statuses.append(int(match[1]) if match else 1)
        if statuses[-1]:
            why = answer[match.end() :].strip() if match else "it did not answer"
            said = f"{gcloud.named([who])} ended with status {statuses[-1]}"
            print(f"\n{said}:\n{why}", file=sys.stderr)
    # Any other failure counts as worse than being stopped.
    failures = [status for status in statuses if status not in (0, PREEMPTED)]
    return max(failures, default=max(statuses))


def check_kind(nodes: list[Node], config: str) -> None:
    """Raises OtherTpus unless the slices are those of TPU_TYPE, or else of the config's recipe."""
    asked = os.environ.get("TPU_TYPE", "")
    try:
        shape = topology.parse(asked) if asked else topology.of_recipe(config)
    except ValueError as error:
        raise OtherTpus(f"TPU_TYPE {error}") from None
    kinds = [node.kind for node in nodes if node.kind]
    if shape is None or not kinds or kinds == shape.count * [shape.accelerator_type]:
        return
    made_for = f"TPU_TYPE is {shape}" if asked else f"{config} is made for {shape}"
    raise OtherTpus(
        f"{', '.join(node.name for node in nodes)} has {' and '.join(kinds)}, but {made_for} "
        f"({shape.accelerator_type}). Name another TPU VM with TPU_NAME, or delete this one with "
        "launch/pod.sh delete. To use it nevertheless, set TPU_TYPE to what it is."
    )


def states(answers: Mapping[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    """The state of each worker that gave one: "running", "none" or "exit N"."""
    found = {
        who: re.findall(r"(?m)^(running|none|exit \d+)$", said) for who, said in answers.items()
    }
    return {who: words[-1] for who, words in found.items() if words}


def where(nodes: list[Node]) -> str:
    return ", ".join(f"{node.name} ({node.workers} workers)" for node in nodes)


def run(pod: Pod, nodes: list[Node], arguments: list[str]) -> int:
    """Starts the run, or attaches to a running one; returns the worst worker's status. Raises
    Unreached and OtherTpus."""
    check_kind(nodes, arguments[0])
    there = states(ask(pod, nodes, STATE))
    silent = [who for node in nodes for who in node.hosts if who not in there]
    if "running" in there.values():
        print(f"a run is going on on {where(nodes)}; looking on", flush=True)
    elif silent:
        raise Unreached(
            f"{gcloud.named(silent)} did not say whether a run is going on there, so nothing was "
            "started. Try again, or see why with gcloud compute tpus tpu-vm ssh "
            f"{silent[0][0]} --worker={silent[0][1]}."
        )
    else:
        start(pod, nodes, arguments)
    try:
        follow(pod, nodes[0])
        status = verdict(nodes, ask(pod, nodes, f"cd {FOLDER} && launch/job.sh end"))
    except KeyboardInterrupt:
        print(
            "\nlaunch/tpu_run.sh: the run goes on. The same command looks on again; "
            "launch/tpu_run.sh --stop tells it to save and end.",
            file=sys.stderr,
        )
        raise
    ending = f"the worst worker ended with status {status}" if status else "done"
    print(f"{where(nodes)}: {ending}")
    return status


def stop(pod: Pod, nodes: list[Node]) -> int:
    """Tells the run to save and end; returns 1 if not every worker could be asked, else 0."""
    answers = ask(pod, nodes, STOP)
    told = [who for who, said in answers.items() if re.search("(?m)^told$", said)]
    here = {who for who, said in answers.items() if re.search("(?m)^(told|none)$", said)}
    if told:
        print("told to stop; the command that started it shows how it ends")
    elif here:
        print("no run is going on on the workers that answered")
    if missing := [who for node in nodes for who in node.hosts if who not in here]:
        print(
            f"launch/tpu_run.sh: not told to stop, because not reached: {gcloud.named(missing)}. "
            "Try again.",
            file=sys.stderr,
        )
    return 1 if missing else 0


def main(arguments: list[str]) -> int:
    pod = gcloud.from_environment()
    try:
        nodes = pod.nodes()
    except gcloud.Refused as refused:
        sys.exit(f"launch/tpu_run.sh: {refused}")
    if arguments == ["--stop"]:
        return stop(pod, nodes)
    try:
        return run(pod, nodes, arguments)
    except (Unreached, OtherTpus) as error:
        sys.exit(f"launch/tpu_run.sh: {error}")
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
