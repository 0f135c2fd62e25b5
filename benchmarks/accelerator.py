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
import collections
import dataclasses
import functools
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import cadpo, generate, result
from saber_jax.batch import Batch
from saber_jax.data.examples import Example
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.records import Record
from saber_jax.generate.generator import Generator
from saber_jax.models import saber
from saber_jax.models.config import LoraConfig, SaberConfig, saber_config
from saber_jax.models.kernels import of_platform
from saber_jax.train import flops
from saber_jax.train.objectives import Compute
from saber_jax.train.preference import Preference
from saber_jax.train.step import TrainState, cadpo_step, partition, sft_step
from saber_jax.tree import flatten

GOAL = 0.4
LORA = LoraConfig(rank=8, alpha=32.0, targets=("text/*",), dropout=0.05)
TEXT_PROJECTIONS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
LEAST_SECONDS = 20.0  # With less time left no variant is begun.
NEW_TOKENS = {True: 8, False: 128}  # Of an answer, quick or not.
VARIANTS = (
    *("cadpo", "cadpo_sdpa", "sft", "sft_sdpa", "generate_8", "generate_8_sdpa"),
    *("cadpo_flash", "generate_32", "generate_32_sdpa", "sft_flash", "cadpo_compile"),
)
"""In the order in which they run."""

Step = Callable[[], float]
"""Makes one step and returns its loss, once it is done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What one process measures."""

    size: str
    variant: str
    seconds: float  # That it may take.
    quick: bool

    @property
    def stage(self) -> str:
        return self.variant.split("_")[0]

    @property
    def peer(self) -> str:
        """ "sdpa", "flash" or "compile" of transformers; "" for ours."""
        last = self.variant.split("_")[-1]
        return last if last in ("sdpa", "flash", "compile") else ""

    @property
    def answers(self) -> int:
        return int(self.variant.split("_")[1])

    @property
    def cfg(self) -> SaberConfig:
        """The network, with the few token ids that the benchmark's tokenizer has."""
        if self.quick:
            text = dataclasses.replace(cadpo.CONFIG.text, layers=1)
            vision = dataclasses.replace(cadpo.CONFIG.vision, depth=2, full_attention_layers=(1,))
            audio = dataclasses.replace(cadpo.CONFIG.audio, layers=1)
            return dataclasses.replace(cadpo.CONFIG, text=text, vision=vision, audio=audio)
        return dataclasses.replace(saber_config(self.size), tokens=saber_config("tiny").tokens)

    @property
    def dtype(self) -> str:
        return "float32" if self.quick else "bfloat16"

    def pair(self) -> tuple[Record, Example]:
        return cadpo.pair(*((2, 30) if self.quick else (20, 450)))


def batch_of(task: Task, example: Example) -> Batch[np.ndarray]:
    """One row: the pair, or its first answer alone. Text slots are a multiple of 128."""
    answer = len(example.responses[0].tokens)
    room = {"patches": len(example.patches), "chunks": len(example.mel), "segments": 1}
    slots = len(example.prompt.tokens)
    if task.stage == "cadpo":
        length = slots + -(slots + 2 * answer) % 128
        budget = Budget(length=length, response=answer, targets=2 * answer, **room)
        return pack_rows([[example]], budget)
    length = slots + answer + -(slots + answer) % 128
    example = dataclasses.replace(example, responses=example.responses[:1], reference=None)
    return pack_rows([[example]], Budget(length=length, targets=answer, **room))


def model_flops(task: Task, cfg: SaberConfig, batch: Batch) -> float:
    """Of a step with adapters trained and everything else frozen."""
    sizes = flops.parameter_sizes(flatten(saber.abstract(cfg)))
    counted = {name: float(value) for name, value in flops.counts(batch).items()}
    trainable = [name for name in sizes if name.startswith("lora/")]
    return sum(flops.train_flops(cfg, sizes, trainable, counted).values())


def random_params(cfg: SaberConfig, dtype: str) -> dict:
    """Made on the device, a leaf at a time: a 7B network need not pass through the host."""

    @functools.partial(jax.jit, static_argnames=("shape", "norm"))
    def draw(key, shape, norm):
        return norm + 0.02 * jax.random.normal(key, shape, jnp.dtype(dtype))

    keys = iter(jax.random.split(jax.random.key(0), 10_000))

    def leaf(path, given):
        name = jax.tree_util.keystr(path)
        return draw(next(keys), given.shape, float("norm" in name and "bias" not in name))

    return jax.tree_util.tree_map_with_path(leaf, saber.abstract(cfg))


def ours(task: Task, example: Example) -> tuple[Step, dict[str, Any]]:
    """The jitted step of a stage, compiled, and how long that took."""
    cfg = dataclasses.replace(task.cfg, lora=LORA)
    batch = jax.device_put(batch_of(task, example))
    compute = Compute(
        dtype=task.dtype,
        remat="matmuls",
        head_chunk=len(example.responses[0].tokens),
        head_keep=True,
        frame_patches=480,
        kernel=of_platform(jax.default_backend()),
        response=len(example.responses[0].tokens) if task.stage == "cadpo" else 0,
    )
    tx = optax.adamw(1e-4)
    if task.stage == "cadpo":
        options = Preference(beta=cadpo.BETA)
        step = functools.partial(cadpo_step, cfg=cfg, compute=compute, tx=tx, options=options)
    else:
        step = functools.partial(sft_step, cfg=cfg, compute=compute, tx=tx)
    trainable, frozen = partition(random_params(cfg, task.dtype), ("lora/*",))
    trainable = {name: leaf.astype(jnp.float32) for name, leaf in trainable.items()}
    states = [TrainState(jnp.zeros((), jnp.int32), trainable, frozen, tx.init(trainable))]
    del trainable, frozen
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(states[0], batch).compile()
    seconds = time.perf_counter() - began

    def run() -> float:
        state, metrics = compiled(states.pop(), batch)
        states.append(state)
        return float(metrics["loss"])

    return run, {"compile_seconds": round(seconds, 1)}


def transformers_model(task: Task) -> Any:
    """The network in transformers on the accelerator, without adapters."""
    import torch
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    config = Qwen2_5OmniThinkerConfig(**generate.to_hf(task.cfg, dtype=task.dtype))
    attention = "flash_attention_2" if task.peer == "flash" else "sdpa"
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return Qwen2_5OmniThinkerForConditionalGeneration._from_config(
            config, attn_implementation=attention, dtype=getattr(torch, task.dtype)
        )


def peers(task: Task, record: Record, example: Example) -> Step:
    """The step of a stage with transformers and peft."""
    import peft
    import torch

    model = transformers_model(task)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    adapters = peft.LoraConfig(
        r=LORA.rank,
        lora_alpha=int(LORA.alpha),
        lora_dropout=LORA.dropout,
        target_modules=TEXT_PROJECTIONS,
    )
    network = peft.get_peft_model(model, adapters)
    called = torch.compile(network) if task.peer == "compile" else network
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)
    paired = task.stage == "cadpo"
    given = generate.inputs([record, record] if paired else [record])
    given = {name: tensor.to(model.device) for name, tensor in given.items()}
    given["pixel_values_videos"] = given["pixel_values_videos"].to(model.dtype)
    given["input_features"] = given["input_features"].to(model.dtype)
    responses = example.responses if paired else example.responses[:1]
    answers = torch.tensor(np.stack([r.tokens for r in responses]), device=model.device)
    given["input_ids"] = torch.cat([given["input_ids"], answers], 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])

    def log_probs():
        logits = called(**given, use_cache=False).logits[:, -answers.shape[1] - 1 : -1].float()
        picked = torch.gather(logits, 2, answers[:, :, None])[:, :, 0]
        return (picked - torch.logsumexp(logits, -1)).sum(1)

    def loss():
        if not paired:
            return -log_probs().sum() / answers.numel()
        with torch.no_grad(), network.disable_adapter():
            reference = log_probs()
        rho = log_probs() - reference
        return -torch.nn.functional.logsigmoid(cadpo.BETA * (rho[0] - rho[1]))

    def run() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return run


def measure_step(task: Task, began: float) -> dict[str, Any]:
    """Median seconds of as many steps as there is time for, after one that warms up."""
    record, example = task.pair()
    made: dict[str, Any] = {}
    if task.peer:
        step = peers(task, record, example)
    else:
        step, made = ours(task, example)
    first = time.perf_counter()
    losses, times = [step()], []
    made.setdefault("compile_seconds", round(time.perf_counter() - first, 1))
    while len(times) < 3 or (len(times) < 10 and time.perf_counter() - began < task.seconds / 2):
        start = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    cfg = dataclasses.replace(task.cfg, lora=LORA)
    asked = model_flops(task, cfg, batch_of(task, example))
    mfu = flops.mfu(asked, seconds, 1, _device_kind())
    found = {
        "seconds": round(seconds, 4),
        "steps": len(times),
        "peak_gib": round(cadpo.peak_memory(), 2),
        "model_tflop_s": round(asked / seconds / 1e12, 3),
        "mfu": None if mfu is None else round(mfu, 3),
        "finite": bool(np.isfinite(losses).all()),
        **made,
    }
    if not task.peer:
        found["kernels"] = top_kernels(step)
    return found


def top_kernels(step: Step, most: int = 12) -> list[tuple[str, float]]:
    """Milliseconds of one step by the scope of its operations, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            step()
        spent: dict[str, float] = collections.defaultdict(float)
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for line in plane.lines:
                    for event in line.events:
                        stats = dict(event.stats)
                        if "hlo_op" in stats:
                            spent[_scope(stats)] += event.duration_ns / 1e6
    longest = sorted(spent.items(), key=lambda item: -item[1])[:most]
    return [(name, round(value, 2)) for name, value in longest]


def _scope(stats: dict[str, Any]) -> str:
    """The last parts of an operation's path, such as "text/blocks/attention/dot_general"."""
    path = str(stats.get("tf_op") or stats.get("name") or stats["hlo_op"]).rstrip(":")
    return "/".join(part for part in path.split("/") if "(" not in part)[-60:]


def measure_generation(task: Task) -> dict[str, Any]:
    """Tokens a second of whole batches: the second one, as the first one compiles."""
    record, _ = task.pair()
    records = [record] * task.answers
    new_tokens = NEW_TOKENS[task.quick]
    if task.peer:
        model = transformers_model(task).eval()
        given = {name: tensor.to(model.device) for name, tensor in generate.inputs(records).items()}
        for name in ("pixel_values_videos", "input_features"):
            given[name] = given[name].to(model.dtype)

        def answer() -> int:
            return sum(map(len, generate._answers(model, given, new_tokens)))
    else:
        params = random_params(task.cfg, task.dtype)
        generator = Generator(
            params,
            task.cfg,
            generate.Letters(),
            max_new_tokens=new_tokens,
            batch_size=task.answers,
            dtype=jnp.dtype(task.dtype),
        )
        del params

        def answer() -> int:
            return sum(len(text.split()) for text in generator.respond(records))

    first = time.perf_counter()
    answer()
    began = time.perf_counter()
    tokens = answer()
    seconds = time.perf_counter() - began
    return {
        "tokens_a_second": round(tokens / seconds, 1),
        "seconds": round(seconds, 3),
        "compile_seconds": round(began - first - seconds, 1),
        "peak_gib": round(cadpo.peak_memory(), 2),
        "finite": tokens > 0,
    }


def _device_kind() -> str:
    """As jax names it, which a process of torch must not ask: jax would take the memory."""
    if "torch" not in sys.modules:
        return jax.local_devices()[0].device_kind
    torch = sys.modules["torch"]
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def run_variant(task: Task) -> dict[str, Any]:
    """`task` in a process of its own, ended when its time is over."""
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
        print(json.dumps(found | {"device": _device_kind()}), flush=True)
        return
    variants = flags.variants.split(",")
    if unknown := sorted(set(variants) - set(VARIANTS)):
        parser.error(f"--variants has {unknown}; there are {', '.join(VARIANTS)}")
    report(flags, variants, measured(flags, variants))


def measured(flags: argparse.Namespace, variants: list[str]) -> dict[str, dict[str, Any]]:
    """Every variant's figures, or why it has none."""
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


if __name__ == "__main__":
    main()
