"""The last line of every benchmark."""

import json
import os
import platform
import sys
from typing import Any, NoReturn


def device() -> str:
    """The accelerator, or the processor and how many of its cores may be used."""
    import jax

    first = jax.devices()[0]
    if first.platform != "cpu":
        return f"{jax.device_count()} x {first.device_kind}"
    count = len(os.sched_getaffinity(0))
    return f"{count} core{'s' * (count > 1)}, {_processor()}"


def finish(
    name: str,
    *,
    value: float | None,
    unit: str,
    goal: float,
    reached: bool,
    device: str,
    quick: bool = False,
    correct: bool = True,
    **more: Any,
) -> NoReturn:
    """Prints the result as one JSON line and exits 0 if it is `ok`, else 1.

    `value` is what `goal` is about; whatever else a reader should see goes into `more`. A full run
    is ok if it `reached` its goals and is `correct`. A `quick` run shows that the benchmark works:
    it measures too little to be held against a goal, so none is printed, and it is ok if it is
    `correct`, which is about results and not about speed.
    """
    aim = {"quick": True} if quick else {"goal": goal}
    ok = bool(correct and (quick or reached))
    result = {"name": name, "value": value, "unit": unit, **aim, "ok": ok, "device": device}
    print(json.dumps(result | more, ensure_ascii=False), flush=True)
    sys.exit(0 if ok else 1)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
