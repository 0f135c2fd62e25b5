"""Everything that a config needs, in order, each step only if it is not done yet.

`launch/tpu_run.sh configs/cadpo.py:tiny` lands here. Every step is a command that a person could
type; it is printed before it runs. A step that ended well leaves ROOT/done/STEP.json, which names
its command and the steps it stands on, so the same call starts, goes on after a kill, and finds in
seconds that all is done.

What you bring is not made: with a data.path, an init.checkpoint or data.pairs of your own, the
steps that would make them are left out.

On a pod every host runs this. Training is the work of all of them at once; of mining and evaluation
each does a share, and the first host joins them; everything else is the first host's, while the
others wait for its stamp (turns.py).
"""

import dataclasses
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app
from ml_collections import ConfigDict

from configs import sft
from configs.command_line import CONFIG, parse_flags
from launch import hardware, turns
from saber_jax.runs import distributed
from saber_jax.runs.distributed import PREEMPTED
from saber_jax.runs.files import write_json
from saber_jax.runs.identity import identity

TERMINATED = 128 + signal.SIGTERM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """`after` are the steps whose results this one reads; `leaves` is what to look at when done;
    `together` is a step that all hosts run at once. Before `command`, several hosts each run
    `share`, if there is one, with --share I/N. `does` is what a done step must have done to be done
    now too, where that is not the command."""

    name: str
    says: str
    command: tuple[str, ...]
    leaves: str
    after: tuple[str, ...] = ()
    together: bool = False
    share: tuple[str, ...] = ()
    does: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def steps(config: ConfigDict, name: str, settings: tuple[str, ...]) -> list[Step]:
    """The whole chain of config `name`, the steps of the config it starts from included.

    `settings` are the `--config.key=value` that were typed; they belong to the stage named, but for
    the seed, which is everybody's.
    """
    root, data = Path(config.root), Path(config.data.path)
    own_records = data != root / "records"
    chain = [] if own_records or not config.embedded else _embedded_corpus(config, root)
    after = ("records",) if chain else ()
    if config.stage == "sft":
        return [*chain, _train(config, name, settings, after)]
    if Path(config.init.checkpoint) == root / "sft":
        chain.append(_stage_1(config, own_records, after))
    if Path(config.data.pairs) == root / "pairs":
        chain.append(_pairs(config, data))
    stage_2 = _train(config, name, settings, ("sft", "pairs"))
    return [*chain, stage_2, *_results(config, root, data)]


STAGES = {
    "sft": "stage 1, SED: evidence first, then the reasoning",
    "cadpo": "stage 2, CA-DPO: prefer the answer that weighs all modalities",
}


def _train(
    config: ConfigDict, name: str, settings: tuple[str, ...], after: tuple[str, ...]
) -> Step:
    return Step(
        name=config.stage,
        says=STAGES[config.stage],
        command=("python", "-m", "saber_jax.main", f"--config={name}", *settings),
        leaves=config.workdir,
        after=after,
        together=True,
        does=identity(config),
    )


def _stage_1(config: ConfigDict, own_records: bool, after: tuple[str, ...]) -> Step:
    """What stage 2 starts from, by the config that suits it."""
    start = sft.get_config(config.variant)
    start.root, start.seed = config.root, config.seed
    inherited = [f"--config.root={config.root}"]
    if own_records:
        start.data.path = config.data.path
        inherited.append(f"--config.data.path={config.data.path}")
    if config.seed:
        inherited.append(f"--config.seed={config.seed}")
    return _train(start, f"configs/sft.py:{config.variant}", tuple(inherited), after)


def _embedded_corpus(config: ConfigDict, root: Path) -> list[Step]:
    corpus = root / "corpus"
    return [
        Step(
            name="corpus",
            says="the embedded corpus saber_mini: drawn faces, synthetic voices, known conflicts",
            command=(
                *("python", "-m", "data_prep.corpus", "--out", str(corpus)),
                *("--seed", str(config.seed)),
            ),
            leaves=str(corpus),
        ),
        Step(
            name="records",
            says="clips and annotations -> SABER records and a vocabulary",
            command=(
                *("python", "-m", "data_prep.build", "--out", str(root / "records")),
                *("--clips", str(corpus / "clips"), "--annotations", str(corpus / "annotations")),
                *("--labels", str(corpus / "labels.jsonl"), *config.sampling),
            ),
            leaves=str(root / "records"),
            after=("corpus",),
        ),
    ]


def _pairs(config: ConfigDict, data: Path) -> Step:
    command = (
        *("python", "-m", "data_prep.preferences", "--checkpoint", config.init.checkpoint),
        *("--records", str(data), "--split", config.data.split),
        *("--out", config.data.pairs, *_generation(config)),
    )
    return Step(
        name="pairs",
        says="preference pairs: what the SED model says with one modality withheld",
        command=command,
        share=command,
        leaves=config.data.pairs,
        after=("sft",),
    )


def _results(config: ConfigDict, root: Path, data: Path) -> list[Step]:
    stages = {"sft": config.init.checkpoint, "cadpo": config.workdir}
    evaluations = []
    for stage, checkpoint in stages.items():
        answer = (
            *("python", "-m", "saber_jax.evaluation.run", "--benchmark", "saber_test"),
            *("--checkpoint", checkpoint, "--data", str(data), "--split", "test"),
            *("--out", str(root / "eval" / stage), *_generation(config)),
        )
        evaluations.append(
            Step(
                name=f"evaluate_{stage}",
                says=f"held-out clips, consistent and not, and each modality's part, {stage} model",
                command=(*answer, "--probes"),
                share=answer,
                leaves=str(root / "eval" / stage / "scores.json"),
                after=(stage,),
            )
        )
    export = Step(
        name="export",
        says="the CA-DPO model as a HuggingFace directory",
        command=(
            *("python", "-m", "saber_jax.hf.export", "--checkpoint", config.workdir),
            *("--out", str(root / "hf")),
        ),
        leaves=str(root / "hf"),
        after=("cadpo",),
    )
    corpus = root / "corpus"
    made_here = ("--corpus", str(corpus)) if config.embedded and data == root / "records" else ()
    mined = Path(config.data.pairs) == root / "pairs"
    report = Step(
        name="report",
        says="one page of what was learnt",
        command=(
            *("python", "-m", "saber_jax.evaluation.report", "--out", str(root / "report.html")),
            *("--sft", stages["sft"], "--cadpo", stages["cadpo"]),
            *("--sft_scores", str(root / "eval/sft"), "--cadpo_scores", str(root / "eval/cadpo")),
            *(("--pairs", config.data.pairs) if mined else ()),
            *made_here,
        ),
        leaves=str(root / "report.html"),
        after=("evaluate_sft", "evaluate_cadpo"),
    )
    return [*evaluations, export, report]


def _generation(config: ConfigDict) -> tuple[str, ...]:
    g = config.generation
    return ("--batch_size", str(g.batch_size), "--max_new_tokens", str(g.max_new_tokens))


def run(chain: list[Step], root: Path, place: tuple[int, int] = (0, 1)) -> None:
    """Runs what is missing. Exits with the failing step's status, saying how to go on.

    `place` is (index, count) of this host.
    """
    if place[1] > 1:
        _meet(root, place)
    began, ran = time.perf_counter(), 0
    stamps: dict[str, str] = {}
    for number, step in enumerate(chain, start=1):
        done = [step.does or step.command, [stamps.get(name) for name in step.after]]
        stamp = hashlib.sha256(json.dumps(done, sort_keys=True).encode()).hexdigest()[:16]
        stamps[step.name] = stamp
        title = f"[{number}/{len(chain)}] {step.name}"
        if _stamped(root, step.name, stamp):
            print(f"{title}: done, see {step.leaves}", flush=True)
            continue
        clock = time.perf_counter()
        with turns.beacon(_sign(root, place[0])):
            _do(step, stamp, title, root, place)
        seconds, ran = time.perf_counter() - clock, ran + 1
        print(f"{title}: took {seconds:.0f} s, left {step.leaves}", flush=True)
    total = time.perf_counter() - began
    what = f"{ran} steps run in {total:.0f} s" if ran else "nothing left to do"
    print(f"\nAll {len(chain)} steps are done ({what}). Look at {chain[-1].leaves}", flush=True)


def _do(step: Step, stamp: str, title: str, root: Path, place: tuple[int, int]) -> None:
    """This host's part of a step; returns when the whole of it is done."""
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
    """Returns when this host's share is done; on the first host, when all are."""
    index, count = place
    names = [f"{step.name}.share{number}of{count}" for number in range(1, count + 1)]
    if not _stamped(root, names[index], stamp):
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
    return path.exists() and json.loads(path.read_text())["stamp"] == stamp


def _put_stamp(root: Path, name: str, stamp: str, command: Sequence[str], seconds: float) -> None:
    made = {"stamp": stamp, "command": command, "seconds": round(seconds, 1)}
    write_json(root / "done" / f"{name}.json", made)


def _work(step: Step, title: str, place: tuple[int, int]) -> None:
    print(f"\n{title}: {step.says}\n  $ {shlex.join(step.command)}", flush=True)
    environ = dict(os.environ)
    if place[1] > 1 and not step.together:
        environ = turns.alone(environ, hardware.tpu_chips())
    status = _run([sys.executable, *step.command[1:]], environ)
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


def _run(command: list[str], environ: dict[str, str]) -> int:
    """Exit status as a shell would give it. SIGTERM is passed on: whoever stops a run tells its
    first process only."""
    process = subprocess.Popen(command, env=environ)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return status if status >= 0 else 128 - status


def _meet(root: Path, place: tuple[int, int]) -> None:
    """Before hours of work: do all hosts run, and see each other on one disk?"""
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


def refuse_hopeless(config: ConfigDict) -> None:
    """Before hours of preparation: is there an accelerator, and is there data?"""
    if config.embedded:
        return
    if not hardware.has_accelerator():
        sys.exit(
            f"launch/tpu_run.sh: {config.model} needs TPUs or GPUs and this machine has only a "
            "CPU. Run it on a pod (README, `On a pod`); here there is "
            f"launch/tpu_run.sh configs/{config.stage}.py:tiny"
        )
    if not Path(config.data.path).exists():
        sys.exit(
            f"launch/tpu_run.sh: no records at {config.data.path}. Build them with python -m "
            f"data_prep.build --clips DIR --annotations DIR --out {config.data.path}"
        )


def main(argv: list[str]) -> None:
    config = CONFIG.value
    if len(argv) > 1:
        sys.exit(f"launch/tpu_run.sh: unexpected {argv[1:]}; settings look like --config.seed=1")
    refuse_hopeless(config)
    signal.signal(signal.SIGTERM, lambda *_: _stop("launch/tpu_run.sh"))
    name = next(a.removeprefix("--config=") for a in sys.argv if a.startswith("--config="))
    settings = tuple(a for a in sys.argv[1:] if a.startswith("--config."))
    run(steps(config, name, settings), Path(config.root), distributed.place())


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
