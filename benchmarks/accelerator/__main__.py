"""Seconds, memory and MFU of training steps on the accelerator that is here, and transformers'.

    python -m benchmarks.accelerator [--size 7b] [--minutes 8] [--quick]

Every variant runs in a process of its own, the most important ones first, and what no time is left
for is named as skipped:

- `cadpo`, `sft`       ours: LoRA of rank 8 on the text tower; a pair shares its prefix, and the
                       reference's log-probs are cached
- `cadpo_sdpa`, ...    transformers and peft as TRL and ms-swift use them: a pair is two rows, media
                       and all, gradient checkpointing, the reference is the model without adapters;
                       `_flash` with flash-attention where that is installed, `_compile` compiled
- `generate_8`, ...    ours: tokens a second of so many answers; `generate_8_sdpa`, transformers'

Networks have random bfloat16 weights of the same shapes. A clip has 20 s (2,400 video and 500 audio
tokens), an answer 450 tokens. MFU divides the model FLOPs of train/flops.py by the maker's peak.
The same definition holds for all: transformers is credited with what the loss needs, not with what
it computes twice. --quick takes a small network and a short clip on whatever is here, to see that
the benchmark works. Peers need what launch/setup.sh --bench installs.
"""

import argparse
import json
import time

from benchmarks.accelerator.measuring import device_kind, measure_generation, measure_step
from benchmarks.accelerator.running import measured, report
from benchmarks.accelerator.task import VARIANTS, Task


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=("3b", "7b"), default="7b")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which ones, in this order")
    parser.add_argument("--quick", action="store_true", help="a small network and a short clip")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=120.0, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.variant:
        task = Task(
            size=flags.size, variant=flags.variant, seconds=flags.seconds, quick=flags.quick
        )
        began = time.perf_counter()
        found = measure_generation(task) if task.stage == "generate" else measure_step(task, began)
        print(json.dumps(found | {"device": device_kind()}), flush=True)
        return
    variants = flags.variants.split(",")
    if unknown := sorted(set(variants) - set(VARIANTS)):
        parser.error(f"--variants has {unknown}; there are {', '.join(VARIANTS)}")
    report(flags, variants, measured(flags, variants))


if __name__ == "__main__":
    main()
