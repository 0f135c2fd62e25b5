"""The train steps and the generation of both sides, and how they are measured."""

import collections
import dataclasses
import functools
import statistics
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

from benchmarks import cadpo, generate
from benchmarks.accelerator.task import LORA, NEW_TOKENS, Task, batch_of, model_flops
from saber_jax.data.examples import Example
from saber_jax.data.records import Record
from saber_jax.generate.generator import Generator
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.models.kernels import of_device
from saber_jax.train import flops
from saber_jax.train.objectives import Compute
from saber_jax.train.preference import Preference
from saber_jax.train.step import TrainState, cadpo_step, partition, sft_step

TEXT_PROJECTIONS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"

Step = Callable[[], float]
"""Makes one step and returns its loss, once it is done."""


def random_params(cfg: SaberConfig, dtype: str) -> dict:
    """Random parameters, drawn on the device array by array, so that 7B never passes the host."""

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
        kernel=of_device(jax.default_backend(), jax.devices()[0].device_kind),
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
    mfu = flops.mfu(asked, seconds, 1, device_kind())
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
    """Tokens per second of the second batch; the first one compiles."""
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


def device_kind() -> str:
    """The name that jax gives to the device. A process of torch must not ask jax, which would
    reserve the memory."""
    if "torch" not in sys.modules:
        return jax.local_devices()[0].device_kind
    torch = sys.modules["torch"]
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
