"""Runs the variants, each in a process of its own, and reports what they measured."""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from benchmarks import result
from benchmarks.accelerator.task import Task
from saber_jax.train import flops

GOAL = 0.4
LEAST_SECONDS = 20.0  # With less time left no variant is begun.


def run_variant(task: Task) -> dict[str, Any]:
    """Runs `task` in a process of its own, which is killed when its time is over."""
    if task.peer == "flash" and importlib.util.find_spec("flash_attn") is None:
        return {"skipped": "flash_attn is not installed"}
    if task.peer and importlib.util.find_spec("peft") is None:
        return {"skipped": "peft is not installed"}
    command = [sys.executable, "-m", "benchmarks.accelerator", "--variant", task.variant]
    command += ["--size", task.size, "--seconds", str(task.seconds)] + ["--quick"] * task.quick
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if task.peer:  # Inputs are made with jax, which must leave the device to torch.
        environment["JAX_PLATFORMS"] = "cpu"
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=task.seconds)
    except subprocess.TimeoutExpired:
        return {"skipped": f"took more than {task.seconds:.0f} s"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        return {"failed": errors.strip().splitlines()[-1:]}
    return json.loads(out.strip().splitlines()[-1])


def measured(flags: argparse.Namespace, variants: list[str]) -> dict[str, dict[str, Any]]:
    """The figures of every variant, or the reason why it has none."""
    end = time.monotonic() + 60 * flags.minutes
    found: dict[str, dict[str, Any]] = {}
    for variant in variants:
        left = end - time.monotonic()
        task = Task(size=flags.size, variant=variant, seconds=min(left, 150.0), quick=flags.quick)
        late = left < LEAST_SECONDS
        found[variant] = {"skipped": "no time was left"} if late else run_variant(task)
        print(f"{variant}: {json.dumps(found[variant])}", flush=True)
        kind = found[variant].get("device", "")
        if not flags.quick and not task.peer and kind and flops.peak_flops(kind) is None:
            sys.exit(
                f"benchmarks.accelerator: {kind!r} is no accelerator whose peak is known "
                "(saber_jax/train/flops.py). Run it on a GPU or a TPU, or give --quick."
            )
    return found


def report(
    flags: argparse.Namespace, variants: list[str], found: dict[str, dict[str, Any]]
) -> None:
    """Ratios are of medians; a variant without figures leaves its ratio out."""

    def over(peer: str, mine: str, key: str = "seconds") -> float | None:
        if key not in found.get(peer, {}) or key not in found.get(mine, {}):
            return None
        return round(found[peer][key] / found[mine][key], 2)

    main_one = found.get("cadpo", {})
    mfu = main_one.get("mfu")
    failed = [name for name, figures in found.items() if "failed" in figures]
    result.finish(
        "accelerator",
        value=mfu,
        unit="MFU of a CA-DPO step with LoRA",
        goal=GOAL,
        reached=mfu is not None and mfu >= GOAL,
        correct=not failed and all(f.get("finite", True) for f in found.values()),
        quick=flags.quick,
        device=main_one.get("device", ""),
        over_sdpa={
            "cadpo": over("cadpo_sdpa", "cadpo"),
            "sft": over("sft_sdpa", "sft"),
            "generate_8": over("generate_8_sdpa", "generate_8"),
        },
        over_flash={"cadpo": over("cadpo_flash", "cadpo"), "sft": over("sft_flash", "sft")},
        variants={name: found[name] for name in variants},
    )
