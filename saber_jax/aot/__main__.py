"""Compiles the programs of a config for TPUs or a GPU, without any, and reports their cost.

    python -m saber_jax.aot --config=configs/cadpo.py:7b-v5e-256 [--program=decode] [--json=F]
    python -m saber_jax.aot --config=configs/cadpo.py:7b --topology=2*v5e:16x16 --hlo=DIR
    python -m saber_jax.aot --compare configs/sft.py:7b-v5e-256 configs/cadpo.py:7b-v5e-256
    python -m saber_jax.aot --config=configs/cadpo.py:7b-lora-gpu --topology=h100
    python -m saber_jax.aot --config=configs/sft.py:7b-v5e-256 --save=gs://BUCKET/7b/executables

The default of --topology is that of the config's recipe (configs/pods.py). Any setting can be
changed as `--config.key=value`. Exits with 1 if the program does not fit. A run loads the train
step from ROOT/executables, where --save put it, if it has the same settings and versions.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import app, flags
from ml_collections import ConfigDict

from configs.command_line import CONFIG, parse_flags
from saber_jax import sharding
from saber_jax.aot import cards, programs, report, targets
from saber_jax.generate import decoding
from saber_jax.models.config import saber_config
from saber_jax.runs import buckets, executables
from saber_jax.train import stage as stages

TOPOLOGY = flags.DEFINE_string("topology", None, "FAMILY:SHAPE, N*FAMILY:SHAPE, or a GPU")
PROGRAM = flags.DEFINE_enum("program", "train", programs.NAMES, "which of the config's programs")
JSON = flags.DEFINE_string("json", None, "also write the figures to this file")
HLO = flags.DEFINE_string("hlo", None, "also write the compiled module's text to this directory")
SAVE = flags.DEFINE_string("save", None, "also write the executable to this folder or gs:// URL")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --config.seed=1")
    config = CONFIG.value
    try:
        _make_folders()
        target = targets.parse(TOPOLOGY.value or config.topology)
        if SAVE.value:
            _check_can_be_loaded(config, target)
        stage = _stage(config, target)
        lowered = programs.lower(PROGRAM.value, config, stage)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"saber_jax.aot: {error}")
    began = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=target.options)
    except jax.errors.JaxRuntimeError as error:
        sys.exit(
            f"saber_jax.aot: {report.refusal(str(error), config, stage, target, PROGRAM.value)}"
        )
    seconds = time.perf_counter() - began
    figures = report.figures(compiled, PROGRAM.value, stage, target, seconds)
    figures["config"] = next(a for a in sys.argv if a.startswith("--config=")).split("=", 1)[1]
    print(report.text(figures))
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(figures, indent=1))
    if HLO.value:
        (Path(HLO.value) / f"{PROGRAM.value}.hlo").write_text(compiled.as_text() or "")
    if SAVE.value:
        where = buckets.native(SAVE.value)
        print(f"saved {executables.save(lowered, compiled, where, target.options)}")
    # The compiler for TPUs has refused it before.
    if figures["memory"]["headroom"] < 0:
        needed = figures["memory"]["peak"]
        sys.exit(
            f"saber_jax.aot: {report.does_not_fit(needed, config, stage, target, PROGRAM.value)}"
        )


def _make_folders() -> None:
    """Before the minutes that compiling takes. Raises OSError where files could not be written."""
    if JSON.value and Path(JSON.value).is_dir():
        raise IsADirectoryError(
            f"--json={JSON.value} is a folder; name the file that the figures go to."
        )
    for folder in (JSON.value and Path(JSON.value).parent, HLO.value):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)


def _check_can_be_loaded(config: ConfigDict, target: targets.Target) -> None:
    """Raises ValueError for a program that no run would load."""
    if isinstance(target, cards.Card):
        raise ValueError("--save is for TPUs: on a GPU the compiler times its alternatives.")
    if PROGRAM.value != "train":
        raise ValueError("--save is for the train step, which is all that a run loads.")
    if config.steps is None:
        raise ValueError(
            "--save needs --config.steps=N: without it the data decide how many steps a run has, "
            "and the learning rates of all steps are part of the program. N is the number of steps "
            "that the run will have."
        )


def _stage(config: ConfigDict, target: targets.Target) -> stages.Stage:
    """As the config's runs have it, or on the mesh that `saber_jax.generate` makes of the same
    devices."""
    if PROGRAM.value not in programs.GENERATION:
        return stages.build(config, sharding.make_mesh(**config.mesh, devices=target.devices()))
    devices = target.devices()
    config.lora.rank = 0  # Adapters are merged when a checkpoint is loaded.
    config.compute.kernel = decoding.prefill_kernel(devices)
    kv_heads = saber_config(config.model).text.kv_heads
    return stages.build(config, sharding.generation_mesh(kv_heads, devices))


def compare(arguments: list[str]) -> None:
    """Two configs under the same other arguments, each in a process of its own."""
    at = arguments.index("--compare")
    names, rest = arguments[at + 1 : at + 3], arguments[:at] + arguments[at + 3 :]
    if len(names) < 2 or any(name.startswith("-") for name in names):
        sys.exit("saber_jax.aot: --compare takes two configs, like configs/sft.py:7b-v5e-256")
    if any(argument.startswith(("--json", "--hlo", "--save")) for argument in rest):
        sys.exit("saber_jax.aot: --compare prints; --json, --hlo and --save are for one config")
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(names):
            out = Path(scratch) / f"{number}.json"
            command = [sys.executable, "-m", "saber_jax.aot", f"--config={name}", f"--json={out}"]
            done = subprocess.run([*command, *rest], stdout=subprocess.DEVNULL, check=False)
            if done.returncode:
                sys.exit(done.returncode)
            results.append(json.loads(out.read_text()))
    print(report.side_by_side(*results))


if __name__ == "__main__":
    if "--compare" in sys.argv:
        compare(sys.argv[1:])
    else:
        app.run(main, flags_parser=parse_flags)
