"""Requests, checks, watches and deletes a TPU pod from a laptop; launch/pod.sh shows the usage."""

from __future__ import annotations  # A laptop's Python may be older than ours.

import dataclasses
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping

from launch import gcloud, remote, topology
from launch.gcloud import Node, Pod

# Final states: the resource has to be deleted and requested again.
GONE = ("PREEMPTED", "MISSING", "FAILED", "TERMINATED", "STOPPED", "SUSPENDED")
# A preempted TPU VM is still READY for some time after its run gets SIGTERM.
TAKEN_BACK_SECONDS = 180
NO_CAPACITY_SECONDS = 300
# After so many failures in a row, the run itself is assumed to be at fault.
MOST_FAILURES = 3
MOST_REQUESTS = 5
LASTING_SECONDS = 3600
# After so many in a row a host is assumed to be dead, though its TPU VM is READY.
MOST_UNREACHED = 20
LEAST_FREE_GIB = 20


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments after the verb. `run` is passed on to launch/tpu_run.sh."""

    run: list[str]
    spot: bool = False
    disk: str = ""
    delete: bool = False

    @property
    def root(self) -> str:
        return self._setting("root")

    @property
    def inputs(self) -> list[str]:
        """What has to be there before the run: the checkpoint that it starts from, and records."""
        tiny = not self.run or self.run[0].endswith(":tiny")
        start = "" if tiny or not self.root else f"{self.root.rstrip('/')}/init"
        given = (self._setting("init.checkpoint") or start, self._setting("data.path"))
        return [path for path in given if path]

    def _setting(self, name: str) -> str:
        values = [a for a in self.run if a.startswith(f"--config.{name}=")]
        return values[-1].partition("=")[2] if values else ""

    def shape(self) -> topology.Slices:
        """TPU_TYPE, or the topology of the recipe. Exits with a message without either."""
        config = self.run[0] if self.run else ""
        try:
            shape = topology.wanted(config, os.environ.get("TPU_TYPE", ""))
        except ValueError as error:
            sys.exit(f"launch/pod.sh: {error}")
        if not topology.GENERATIONS[shape.generation].accelerator:
            sys.exit(
                f"launch/pod.sh: {shape.generation} exists on GKE alone; see launch/tpu_run.sh."
            )
        return shape


def read(words: list[str]) -> Arguments:
    """Parses arguments. Exits with a message for unknown flags."""
    flags = [a for a in words if re.match(r"--(spot|delete|disk=.+)$", a)]
    rest = [a for a in words if a not in flags]
    if rest and rest[0] != "--stop" and not rest[0].startswith("configs/"):
        sys.exit(f"launch/pod.sh: expected configs/NAME.py:VARIANT, got {rest[0]!r}")
    strange = [a for a in rest[1:] if not a.startswith(("--config.", "--until="))]
    if strange:
        sys.exit(
            f"launch/pod.sh: unknown {strange[0]}; there are --spot, --disk=NAME, --delete and "
            "settings such as --config.seed=1"
        )
    disk = next((a.partition("=")[2] for a in flags if a.startswith("--disk=")), "")
    return Arguments(rest, spot="--spot" in flags, disk=disk, delete="--delete" in flags)


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def create(pod: Pod, arguments: Arguments) -> None:
    """Requests the TPUs and waits for them. Exits with a message if they do not come."""
    request(pod, arguments)
    state = wait_for(pod)
    if state != "READY":
        sys.exit(
            f"launch/pod.sh: {pod.name} is {state}. Look at it with gcloud compute tpus "
            f"queued-resources describe {pod.name}, and delete it with launch/pod.sh delete."
        )


def request(pod: Pod, arguments: Arguments) -> None:
    shape = arguments.shape()
    kind = "spot" if arguments.spot else "on demand"
    log(f"asking for {shape} ({shape.accelerator_type}, {kind}) as {pod.name} in {pod.zone}")
    pod.create(shape, spot=arguments.spot, disk=arguments.disk)


def wait_for(pod: Pod) -> str:
    """Returns when the TPUs are READY or gone, printing every change. If this is interrupted, the
    request stays in the queue."""
    before = ""
    while True:
        state = pod.state()
        if state not in (before, "MISSING"):
            log(f"{pod.name} is {state}")
        if state == "READY" or state in GONE:
            return state
        before = state
        time.sleep(gcloud.pause())


def preflight(pod: Pod, arguments: Arguments) -> int:
    """Prints the problems of the workers; returns 1 if a run could not work, else 0."""
    nodes = pod.nodes()
    shape = arguments.shape()
    remote.ship(pod, nodes)
    command = shlex.join(["launch/preflight.sh", arguments.root, *arguments.inputs])
    answers = gcloud.ask(pod, nodes, f"{remote.UNPACK} && {command}")
    problems, hints = judge(shape, nodes, answers)
    for title, found in (("PROBLEM", problems), ("hint", hints)):
        for text, workers in found.items():
            print(f"{title}: {text}  [{gcloud.named(workers)}]")
    count = sum(node.workers for node in nodes)
    print(f"{count} workers looked at: {len(problems)} problems, {len(hints)} hints")
    return 1 if problems else 0


Found = dict  # text -> workers to which it applies


def judge(
    shape: topology.Slices, nodes: list[Node], answers: Mapping[tuple[str, int], str]
) -> tuple[Found, Found]:
    """(problems, hints) from the answers of the workers, each with the workers it applies to."""
    problems: Found = {}
    hints: Found = {}
    chips, pythons = {}, {}
    for who in (who for node in nodes for who in node.hosts):
        facts = _facts(answers.get(who, ""))
        if facts is None:
            last = answers.get(who, "").rpartition("\n")[2]
            text = f"its answer cannot be used: {last}" if last else "does not answer over ssh"
            problems.setdefault(text, []).append(who)
            continue
        chips[who] = int(facts["chips"])
        pythons.setdefault(facts["python"], []).append(who)
        for found, texts in zip((problems, hints), _of_worker(facts)):  # noqa: B905
            for text in texts:
                found.setdefault(text, []).append(who)
    for node in nodes:
        there = sum(chips.get(who, 0) for who in node.hosts)
        if there != shape.chips and all(who in chips for who in node.hosts):
            text = f"{there} chips are attached, the recipe is made for {shape.chips} ({shape})"
            problems.setdefault(text, []).extend(who for who in chips if who[0] == node.name)
    if len(pythons) > 1:
        # Workers of one image do not differ, so these were not made together.
        for versions, workers in pythons.items():
            hints[f"workers differ: Python {versions or 'none'} here"] = workers
    if len(nodes) != shape.count:
        text = f"{len(nodes)} slices are there, the recipe is made for {shape.count} ({shape})"
        problems[text] = list(chips)
    return problems, hints


def _facts(answer: str) -> dict[str, str] | None:
    """What launch/preflight.sh printed; None if it is not all there."""
    lines = answer.splitlines()
    facts = {name: fact for name, _, fact in (line.partition(" ") for line in lines)}
    numbers = (facts.get("chips", ""), facts.get("free_gib", ""))
    return facts if "python" in facts and all(map(str.isdigit, numbers)) else None


def _of_worker(facts: Mapping[str, str]) -> tuple[list[str], list[str]]:
    problems, hints = [], []
    if facts.get("root", "ok") != "ok":
        problems.append(f"the run's folder: {facts['root']}")
    for path in facts.get("missing", "").split():
        problems.append(f"there is no {path}, or it cannot be read")
    if int(facts["free_gib"]) < LEAST_FREE_GIB:
        problems.append(
            f"less than {LEAST_FREE_GIB} GiB are free in the home directory; the environment and "
            "what it installs from need that much"
        )
    pythons = re.findall(r"3\.(\d+)", facts["python"])
    if not any(minor in ("11", "12") for minor in pythons):
        hints.append(
            f"no Python 3.11 or 3.12 (there is{facts['python'] and ' ' + facts['python']}); "
            "launch/setup.sh gets one with uv"
        )
    if facts.get("huge_pages", "always") != "always":
        hints.append("transparent huge pages are off; the run switches them on")
    return problems, hints


def watch(pod: Pod, arguments: Arguments) -> int:
    """Runs to the end through preemptions; returns the run's exit status."""
    arguments.shape()  # Exits now, not after the first preemption, if it is not known.
    failures = 0
    while True:
        make_ready(pod, arguments)
        began = time.monotonic()
        status = attempt(pod, arguments)
        if status == 0:
            if arguments.delete:
                pod.delete()
                log(f"{pod.name} is deleted")
            else:
                log(f"{pod.name} is still there and costs money: launch/pod.sh delete")
            return 0
        if taken_back(pod):
            log(f"{pod.name} was taken back")
            continue
        if status == remote.PREEMPTED:
            log("the run was told to stop, and its TPUs are still there; not starting it again")
            return status
        failures = 1 if time.monotonic() - began > LASTING_SECONDS else failures + 1
        if failures >= MOST_FAILURES:
            log(f"the run failed {failures} times in a row; giving up with status {status}")
            return status
        log(f"the run failed with status {status}; starting it again")


def attempt(pod: Pod, arguments: Arguments) -> int:
    """One start of the run, or a look at it while it runs; a SystemExit inside counts as its
    failure. While workers cannot be reached it may go on, so that is no failure: tries again until
    the TPUs are gone. Raises Unreached after MOST_UNREACHED tries in a row."""
    failed = 0
    while True:
        try:
            return remote.run(pod, pod.nodes(), arguments.run)
        except SystemExit as stopped:
            if isinstance(stopped.code, int):
                return stopped.code
            print(stopped.code, file=sys.stderr, flush=True)
            return 1
        except remote.Unreached as unreached:
            failed = 1 if unreached.heard else failed + 1
            if failed == MOST_UNREACHED:
                raise
            log(f"{unreached} Trying again.")
        time.sleep(gcloud.pause())
        if pod.state() != "READY":
            return 1


def taken_back(pod: Pod) -> bool:
    """Whether the TPUs are preempted, waiting for the time that this takes to show."""
    deadline = time.monotonic() + float(os.environ.get("TAKEN_BACK_SECONDS", TAKEN_BACK_SECONDS))
    while pod.state() == "READY":
        if time.monotonic() > deadline:
            return False
        time.sleep(gcloud.pause())
    return True


def make_ready(pod: Pod, arguments: Arguments) -> None:
    """Returns when the TPUs are READY, requesting them whenever they are gone. Exits with a message
    after MOST_REQUESTS requests that failed."""
    failed = 0
    while (state := wait_for(pod)) != "READY":
        # An old request that failed is no reason to wait with a new one.
        if state == "FAILED":
            failed += 1
        if failed > MOST_REQUESTS:
            sys.exit(
                f"launch/pod.sh: {MOST_REQUESTS} requests in a row failed; the last one is left. "
                f"Look at it with gcloud compute tpus queued-resources describe {pod.name}"
            )
        if failed > 1:
            log("the request failed; making another one in a while")
            time.sleep(_long_pause())
        renew(pod, arguments)


def renew(pod: Pod, arguments: Arguments) -> None:
    """Deletes what there is, even if only the request is left of it, and makes a new request,
    unless there is no capacity."""
    pod.delete()
    try:
        request(pod, arguments)
    except gcloud.Refused as refused:
        if not refused.no_capacity:
            raise
        log(f"no capacity in {pod.zone}; asking again in a while")
        time.sleep(_long_pause())


def _long_pause() -> float:
    return min(NO_CAPACITY_SECONDS, 30 * gcloud.pause())


def main(words: list[str]) -> int:
    verb, rest = (words or ["--help"])[0], words[1:]
    if verb not in ("create", "preflight", "run", "watch", "delete"):
        usage = (remote.ROOT / "launch/pod.sh").read_text().split("set -euo")[0]
        print(re.sub(r"(?m)^#!.*\n|^# ?", "", usage))
        return 0 if verb in ("-h", "--help", "help") else 2
    arguments, pod = read(rest), gcloud.from_environment()
    if arguments.run == ["--stop"] and verb != "run":
        sys.exit("launch/pod.sh: --stop belongs to run: launch/pod.sh run --stop")
    if verb != "delete" and not arguments.run and not os.environ.get("TPU_TYPE"):
        sys.exit(f"launch/pod.sh: {verb} what? Name a config, such as configs/cadpo.py:7b-v5e-256.")
    try:
        if verb == "create":
            create(pod, arguments)
        elif verb == "preflight":
            return preflight(pod, arguments)
        elif verb == "run":
            return remote.main(arguments.run)
        elif verb == "watch":
            return watch(pod, arguments)
        else:
            there = pod.delete()
            print(f"{pod.name} {'is deleted' if there else 'was not there'}")
    except (gcloud.Refused, remote.Unreached, remote.OtherTpus) as error:
        sys.exit(f"launch/pod.sh: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nlaunch/pod.sh: interrupted; {pod.name} stays as it is. launch/pod.sh delete")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
