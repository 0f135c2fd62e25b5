"""Runs the chain of a config: all steps that it needs, in order, skipping those that are done.

`launch/tpu_run.sh configs/cadpo.py:tiny` calls this. Every step is a command that you could also
type; it is printed before it runs. A step that succeeded writes a stamp, ROOT/done/STEP.json, with
its command and the steps that it depends on. So the same call starts the chain, continues it after
an interruption, and finds in seconds that all is done.

On a pod every host runs this. All hosts train together. For mining and evaluation each host does a
share, and the first host joins them. The first host does everything else, while the others wait for
its stamp (turns.py).
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import ConfigDict

from configs.command_line import CONFIG, parse_flags
from launch import hardware, hours, outcome, processes, turns
from launch.steps import Step, stage_1, steps, until, with_own_workdir
from saber_jax.data.records import splits_of
from saber_jax.runs import distributed, manifest, platforms
from saber_jax.runs.distributed import PREEMPTED
from saber_jax.runs.files import exists, read_json, write_json
from saber_jax.runs.identity import LATER, MAY_CHANGE, identity

TERMINATED = 128 + signal.SIGTERM
BAR_SECONDS = 30  # Between two states of a progress bar in a log.
UNTIL = flags.DEFINE_string(
    "until", "", "Step after which to stop. The same command without it goes on, on any machine."
)


def run(chain: list[Step], root: Path, place: tuple[int, int] = (0, 1)) -> None:
    """Runs the missing steps. Exits with the status of a failing step and says how to continue.

    `place` is (index, count) of this host.
    """
    if place[1] > 1:
        _meet(root, place)
    began, ran = time.perf_counter(), 0
    stamps: dict[str, str] = {}
    for number, step in enumerate(chain, start=1):
        done = [step.does or step.command, [stamps.get(name) for name in step.after]]
        stamp = manifest.digest(done)
        stamps[step.name] = stamp
        title = f"[{number}/{len(chain)}] {step.name}"
        if _stamp_read(root, step.name, stamp) and _is_there(step.leaves):
            print(f"{title}: done, see {step.leaves}", flush=True)
            continue
        clock = time.perf_counter()
        with turns.beacon(_sign(root, place[0])), _hours(root, step.name, place):
            _do(step, stamp, title, root, place)
        seconds, ran = time.perf_counter() - clock, ran + 1
        print(f"{title}: took {seconds:.0f} s, left {step.leaves}", flush=True)
    total = time.perf_counter() - began
    what = f"{ran} steps run in {total:.0f} s" if ran else "nothing left to do"
    print(f"\nAll {len(chain)} steps are done ({what}).", flush=True)
    if place[0] == 0:
        print(*filter(None, (outcome.text(chain), hours.text(root))), sep="\n", flush=True)


def _hours(
    root: Path, name: str, place: tuple[int, int]
) -> contextlib.AbstractContextManager[None]:
    if place[0]:
        return contextlib.nullcontext()
    return hours.counted(root, name, place[1] * hardware.tpu_chips())


def _do(step: Step, stamp: str, title: str, root: Path, place: tuple[int, int]) -> None:
    """Runs this host's part of a step; returns when the whole step is done."""
    index, count = place
    if step.share and count > 1:
        _do_share(step, stamp, title, root, place)
    if index == 0 or step.together:
        clock = time.perf_counter()
        _work(step, title, place)
    if index == 0:
        _put_stamp(root, step.name, stamp, step.command, time.perf_counter() - clock)
    else:
        _wait(root, step.name, stamp, title, host=0)


def _do_share(step: Step, stamp: str, title: str, root: Path, place: tuple[int, int]) -> None:
    """Runs this host's share; the first host waits for all shares and joins them."""
    index, count = place
    names = [f"{step.name}.share{number}of{count}" for number in range(1, count + 1)]
    if not _stamp_read(root, names[index], stamp):
        clock = time.perf_counter()
        share = (*step.share, "--share", f"{index + 1}/{count}")
        _work(dataclasses.replace(step, command=share), title, place)
        _put_stamp(root, names[index], stamp, share, time.perf_counter() - clock)
    for host in range(1, count) if index == 0 else ():
        _wait(root, names[host], stamp, title, host)


def _sign(root: Path, host: int) -> Path:
    return root / "done" / f"host_{host}"


def _stamped(root: Path, name: str, stamp: str) -> bool:
    path = root / "done" / f"{name}.json"
    # Read without asking first whether it exists, which is two more requests in a bucket: all hosts
    # that wait for a step do this every few seconds.
    try:
        return read_json(path)["stamp"] == stamp
    except FileNotFoundError:
        return False


def _is_there(path: str) -> bool:
    """Whether a file or folder exists, asked again while the disk fails."""
    return turns.insist(lambda: exists(path))


def _stamp_read(root: Path, name: str, stamp: str) -> bool:
    """`_stamped`, retried while the disk fails."""
    return turns.insist(lambda: _stamped(root, name, stamp))


def _put_stamp(root: Path, name: str, stamp: str, command: Sequence[str], seconds: float) -> None:
    made = {"stamp": stamp, "command": command, "seconds": round(seconds, 1)}
    turns.insist(lambda: write_json(root / "done" / f"{name}.json", made))


def _work(step: Step, title: str, place: tuple[int, int]) -> None:
    print(f"\n{title}: {step.says}\n  $ {shlex.join(step.command)}", flush=True)
    environ = platforms.with_kept_buffers(os.environ)
    if not sys.stderr.isatty():  # In a log, every state of a progress bar stays.
        environ.setdefault("TQDM_MININTERVAL", str(BAR_SECONDS))
    if place[1] > 1 and not step.together:
        environ = turns.alone(environ, hardware.tpu_chips())
    command, environs = [sys.executable, *step.command[1:]], [environ]
    if step.rows and (cores := processes.count(command, step.rows, environ)) > 1:
        print(f"  in {cores} processes, one a core, which share the rows of a step", flush=True)
        command.extend(processes.SETTINGS)
        environs = processes.joined(environ, cores)
    status = processes.run(command, environs)
    if status == 0:
        return
    if status in (PREEMPTED, TERMINATED):
        _stop(title)
    print(
        f"{title}: failed with status {status} (see above). When that is mended, the same command "
        "goes on from here.",
        file=sys.stderr,
    )
    sys.exit(status)


def _stop(where: str) -> NoReturn:
    print(f"{where}: stopped as asked. The same command goes on from here.", file=sys.stderr)
    sys.exit(PREEMPTED)


def _meet(root: Path, place: tuple[int, int]) -> None:
    """Checks before hours of work that all hosts run and see each other on one disk."""
    index, count = place
    print(f"host {index} of {count}: meeting the others in {root}/done", flush=True)
    if absent := turns.meet(root / "done", index, count):
        who = f"host {', '.join(map(str, absent))} of {count}"
        sys.exit(
            f"launch/tpu_run.sh: host {index} did not meet {who} in {root} within "
            f"{turns.MEETING_SECONDS} s. Either the command was not started there, or {root} is "
            "not on a disk that all hosts share (docs/performance.md, `Disks`)."
        )


def _wait(root: Path, name: str, stamp: str, title: str, host: int) -> None:
    print(f"{title}: waiting for host {host}", flush=True)
    if not turns.wait(lambda: _stamped(root, name, stamp), _sign(root, host)):
        sys.exit(
            f"{title}: host {host} failed, or has not been heard of for "
            f"{turns.PATIENCE_SECONDS} s. See its output."
        )


def refuse_without_accelerator_or_data(config: ConfigDict) -> None:
    """Checks before hours of preparation that there is an accelerator and data."""
    if config.embedded:
        return
    if not hardware.has_accelerator():
        sys.exit(
            f"launch/tpu_run.sh: {config.model} needs TPUs or GPUs and this machine has only a "
            "CPU. Run it on a pod (README, `On a pod`); here there is "
            f"launch/tpu_run.sh configs/{config.stage}.py:tiny"
        )
    if not exists(config.data.path):
        sys.exit(
            f"launch/tpu_run.sh: no records at {config.data.path}. Build them with python -m "
            f"data_prep.build --clips DIR --annotations DIR --out {config.data.path}"
        )


def refuse_missing_splits(config: ConfigDict, chain: Sequence[Step]) -> None:
    """Checks that the records have all splits that steps need, because stage 1 may take days before
    the first step that needs another one."""
    if any(step.name == "records" for step in chain):
        return  # They are made here, with all splits.
    try:
        there = splits_of(config.data.path)
    except FileNotFoundError as error:
        sys.exit(f"launch/tpu_run.sh: {error}")
    missing: dict[str, list[str]] = {}
    for step in chain:
        split = _split_of(step)
        if split and split not in there:
            missing.setdefault(split, []).append(step.name)
    if missing:
        needed = "; ".join(f"{split!r} for {', '.join(names)}" for split, names in missing.items())
        sys.exit(
            f"launch/tpu_run.sh: the records in {config.data.path} have the splits "
            f"{', '.join(there)}, but not {needed}. Build them again with a split for every clip "
            "(`python -m data_prep.build --help`, --labels), or end the chain before those steps "
            "with --until=STEP."
        )


def _split_of(step: Step) -> str | None:
    """The split of config.data.path that a step reads, if it reads one."""
    if "--split" in step.command:
        return step.command[step.command.index("--split") + 1]
    return None if step.does.get("data.mixture") else step.does.get("data.split")


def refuse_taken(config: ConfigDict, settings: tuple[str, ...]) -> None:
    """Checks before anything runs that the work directories have no runs with other settings."""
    config, _ = with_own_workdir(config, settings)
    start = stage_1(config)
    carried = ""
    if start is not None:
        other = Path(config.root).parent / "NAME"
        _refuse_other_run(start, f"Stage 1 is another one, so add --config.root={other}.")
        if exists(Path(start.workdir) / "summary.json"):
            carried = "; stage 1, the pairs and their evaluation are used again"
    other = Path(config.workdir).parent / "NAME"
    _refuse_other_run(
        config,
        f"To keep both, add --config.workdir={other}: what this run leaves goes there{carried}.",
    )


def _refuse_other_run(config: ConfigDict, remedy: str) -> None:
    taken = Path(config.workdir) / "config.json"
    if not exists(taken):
        return
    # An unfinished run may go on with some other settings; saber_jax.main logs the change.
    may = () if exists(taken.with_name("summary.json")) else MAY_CHANGE
    there, here = LATER | identity(read_json(taken)), identity(config)
    try:
        manifest.check(
            {name: value for name, value in there.items() if name not in may},
            {name: value for name, value in here.items() if name not in may},
            what=f"{config.workdir} holds a run with other settings",
            remedy=remedy,
        )
    except ValueError as error:
        sys.exit(f"launch/tpu_run.sh: {error}")


def main(argv: list[str]) -> None:
    config = CONFIG.value
    if len(argv) > 1:
        sys.exit(f"launch/tpu_run.sh: unexpected {argv[1:]}; settings look like --config.seed=1")
    refuse_without_accelerator_or_data(config)
    signal.signal(signal.SIGTERM, lambda *_: _stop("launch/tpu_run.sh"))
    name = next(a.removeprefix("--config=") for a in sys.argv if a.startswith("--config="))
    settings = tuple(a for a in sys.argv[1:] if a.startswith("--config."))
    refuse_taken(config, settings)
    chain = until(steps(config, name, settings), UNTIL.value)
    refuse_missing_splits(config, chain)
    run(chain, Path(config.root), distributed.place())


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
