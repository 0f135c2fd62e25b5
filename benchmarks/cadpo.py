"""Preference pairs per second of a CA-DPO step: with shared prefixes, duplicated ones, and torch.

    python -m benchmarks.cadpo [--quick]

The same pairs and random float32 weights in three processes that take turns, a step each:

- `shared`     ours: a row is [shared prefix | chosen | rejected], reference log-probs are cached
- `unshared`   ours: chosen and rejected are rows of their own, reference log-probs are cached
- `torch`      transformers' thinker as TRL and ms-swift train it: chosen and rejected duplicated,
               media and all, logits of every slot, gradient checkpointing, and a frozen copy of the
               model for the reference, which runs inside the step

A pair is a 20 s clip (2,400 video and 500 audio tokens) with two answers of 450 tokens that begin
differently, so that nothing but the prompt is shared. Towers are frozen, layers rematerialised; the
network is small (32 million weights, 4 layers of text), because only ratios are reported. FLOPs of
our steps are counted by train/flops.py, with what is rematerialised, and those of torch by its own
counter; their ratio is the speed-up to expect. Needs what launch/setup.sh --bench installs.
"""

import argparse
import copy
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import generate, result
from saber_jax.batch import Batch, Branch
from saber_jax.data.examples import Example, Response, encode_record
from saber_jax.data.media import SAMPLE_RATE
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.records import Record
from saber_jax.data.withhold import VIEWS
from saber_jax.models import saber
from saber_jax.train import flops
from saber_jax.train.objectives import Compute, target_log_probs
from saber_jax.train.preference import Preference
from saber_jax.train.step import TrainState, cadpo_step, gradients, partition
from saber_jax.tree import flatten

CONFIG = dataclasses.replace(
    generate.CONFIG, text=dataclasses.replace(generate.CONFIG.text, layers=4)
)
BETA = 0.1
REFERENCE = -9.0  # Cached log pi_ref of every target; the value does not influence the speed.
SHARE_OF_COUNTED = 0.95
OVER_TORCH = 2.2

COMPUTE = Compute(dtype="float32", remat="layer", head_chunk=150, frame_patches=480)
Step = Callable[[], None]


def pair(seconds: int, answer: int) -> tuple[Record, Example]:
    """Two frames a second of 224 x 420 pixels, sound, and two random answers of `answer` tokens."""
    rng = np.random.default_rng(0)
    record = Record(
        clip_id="clip",
        language="en",
        frames=rng.integers(0, 256, (2 * seconds, 224, 420, 3), np.uint8),
        seconds_per_grid=1.0,
        audio=rng.integers(-9000, 9000, seconds * SAMPLE_RATE, np.int16),
        annotation={},
        labels={},
        provenance={},
    )
    prompt = encode_record(record, generate.Letters(), responses=())
    tokens = rng.integers(20, CONFIG.text.vocab, (2, answer))
    tokens[:, -1] = CONFIG.tokens.eos
    tokens[:, 0] = 20, 21
    sections = np.ones(answer, np.int64)
    answers = tuple(Response(tokens=row, sections=sections) for row in tokens)
    reference = np.full((len(VIEWS), 2 * answer), REFERENCE, np.float32)
    return record, dataclasses.replace(prompt, responses=answers, reference=reference)


def batches(example: Example) -> dict[str, Batch[np.ndarray]]:
    """The pair in one row that shares its prompt, and in two rows."""
    length, answer = len(example.prompt.tokens), len(example.responses[0].tokens)
    room = {"patches": len(example.patches), "chunks": len(example.mel), "segments": 1}
    shared = Budget(length=length, response=answer, targets=2 * answer, **room)
    single = Budget(length=length + answer, targets=answer, **room)
    rows = [
        [dataclasses.replace(example, responses=(response,), reference=None)]
        for response in example.responses
    ]
    return {"shared": pack_rows([[example]], shared), "unshared": pack_rows(rows, single)}


def counted(batch: Batch) -> float:
    """FLOPs of a step with trained text and frozen towers, the text's forward pass twice."""
    sizes = flops.parameter_sizes(flatten(saber.abstract(CONFIG)))
    trainable = [name for name in sizes if name.startswith("text/")]
    found = {name: float(value) for name, value in flops.counts(batch).items()}
    again = flops.train_flops(CONFIG, sizes, [], found)["text"]
    return sum(flops.train_flops(CONFIG, sizes, trainable, found).values()) + again


def forward(batch: Batch) -> float:
    """FLOPs of one forward pass, as a reference inside the step needs."""
    sizes = flops.parameter_sizes(flatten(saber.abstract(CONFIG)))
    found = {name: float(value) for name, value in flops.counts(batch).items()}
    return sum(flops.train_flops(CONFIG, sizes, [], found).values())


def unshared_step(state: TrainState, batch: Batch, *, tx, compute: Compute):
    """cadpo_step over rows (chosen, rejected): the paper's form, without sharing anything."""

    def objective(params, rows):
        rho = (target_log_probs(params, rows, CONFIG, compute) - REFERENCE).sum(1)
        return -jax.nn.log_sigmoid(BETA * (rho[0] - rho[1])), jnp.ones(()), {}

    (loss, _, _), grads = gradients(state, batch, objective, 1)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    trainable = cast(dict, optax.apply_updates(state.trainable, updates))
    return TrainState(state.step + 1, trainable, state.frozen, opt_state), {"loss": loss}


def ours(variant: str, example: Example) -> Step:
    """A jitted step that donates its state."""
    batch = jax.device_put(batches(example)[variant])
    tx = optax.adamw(1e-6)
    if variant == "shared":
        compute = dataclasses.replace(COMPUTE, response=len(example.responses[0].tokens))
        options = Preference(beta=BETA)
        step = functools.partial(cadpo_step, cfg=CONFIG, compute=compute, tx=tx, options=options)
    else:
        step = functools.partial(unshared_step, tx=tx, compute=COMPUTE)
    trainable, frozen = partition(jax.device_put(generate.weights(CONFIG)), ("text/*",))
    states = [TrainState(jnp.zeros((), jnp.int32), trainable, frozen, tx.init(trainable))]
    del trainable, frozen
    compiled = jax.jit(step, donate_argnums=0)

    def run() -> None:
        state, metrics = compiled(states.pop(), batch)
        states.append(jax.block_until_ready(state))
        assert np.isfinite(metrics["loss"])

    return run


def torchs(record: Record, example: Example) -> Step:
    """The step as TRL's trainer makes it, without its bookkeeping."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = generate.reference(generate.weights(CONFIG), CONFIG).to(device)
    frozen = copy.deepcopy(model).requires_grad_(False)
    model.model.visual.requires_grad_(False)
    model.model.audio_tower.requires_grad_(False)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    given = {name: tensor.to(device) for name, tensor in generate.inputs([record, record]).items()}
    answers = torch.tensor(np.stack([r.tokens for r in example.responses]), device=device)
    given["input_ids"] = torch.cat([given["input_ids"], answers], 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])

    def log_probs(network):
        logits = network(**given, use_cache=False).logits[:, -answers.shape[1] - 1 : -1].float()
        picked = torch.gather(logits, 2, answers[:, :, None])[:, :, 0]
        return (picked - torch.logsumexp(logits, -1)).sum(1)

    def run() -> None:
        with torch.no_grad():
            reference = log_probs(frozen)
        rho = log_probs(model) - reference
        loss = -torch.nn.functional.logsigmoid(BETA * (rho[0] - rho[1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert np.isfinite(loss.item())

    return run


def first_step(variant: str, step: Step) -> dict[str, float]:
    """Compiles our step, or counts the FLOPs of torch's."""
    if variant != "torch":
        step()
        return {}
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return {"flops": float(counter.get_total_flops())}


def serve(variant: str, seconds: int, answer: int) -> None:
    """Runs one variant in this process: for every line read, a step and a JSON line."""
    record, example = pair(seconds, answer)
    step = torchs(record, example) if variant == "torch" else ours(variant, example)
    print(json.dumps(first_step(variant, step)), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        spent = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": spent[0], "cpu": spent[1], "memory": peak_memory()}), flush=True)


def peak_memory() -> float:
    """Peak GiB of the accelerator if there is one, else of the process with its libraries."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**30
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats:
        return stats["peak_bytes_in_use"] / 2**30
    # The peak of getrusage would include that of the parent process before the fork.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


class Worker:
    """A variant's process."""

    def __init__(self, variant: str, seconds: int, answer: int):
        command = [sys.executable, "-m", "benchmarks.cadpo", "--serve", variant]
        self._process = subprocess.Popen(
            [*command, "--seconds", str(seconds), "--answer", str(answer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )

    def step(self) -> dict[str, float]:
        print("step", file=self._process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        self._process.communicate()  # It ends at the end of its input.

    def read(self) -> dict[str, float]:
        """Its next line. The first one comes after its first step."""
        line = cast(IO[str], self._process.stdout).readline()
        if not line:
            raise RuntimeError("A variant's process ended early; its message is above.")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a 4 s clip, short answers")
    parser.add_argument("--serve", choices=("shared", "unshared", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        return serve(flags.serve, flags.seconds, flags.answer)
    seconds, answer, rounds = (4, 150, 2) if flags.quick else (20, 450, 5)
    rows = batches(pair(seconds, answer)[1])
    count = {variant: counted(batch) for variant, batch in rows.items()}
    count["duplicate_everything"] = count["unshared"] + forward(rows["unshared"])
    # All at once: they import and compile on one core each, and nothing is timed yet.
    workers = {name: Worker(name, seconds, answer) for name in ("torch", "shared", "unshared")}
    first = {variant: worker.read() for variant, worker in workers.items()}
    count["torch"] = first["torch"]["flops"]
    print({name: f"{value / 1e9:.0f} GFLOP" for name, value in count.items()}, flush=True)
    steps = {variant: [] for variant in workers}
    for number in range(rounds):
        for variant, worker in workers.items():
            steps[variant].append(worker.step())
            print(f"round {number} {variant}: {steps[variant][-1]}", flush=True)
    for worker in workers.values():
        worker.close()
    report(rows["shared"], count, steps, quick=flags.quick)


def report(
    shared: Batch, count: dict[str, float], steps: dict[str, list[dict]], *, quick: bool
) -> None:
    """Prints medians of ratios per round, so that other load on the machine affects all alike."""

    def over(variant: str, clock: str) -> float:
        pairs = zip(steps[variant], steps["shared"], strict=True)
        return statistics.median(theirs[clock] / mine[clock] for theirs, mine in pairs)

    memory = {name: round(max(s["memory"] for s in got), 2) for name, got in steps.items()}
    promised = count["unshared"] / count["shared"]
    reached = over("unshared", "wall") / promised
    faster = over("torch", "wall")
    goal: dict[str, Any] = {} if quick else {"share_goal": SHARE_OF_COUNTED}
    leanest = memory["shared"] < min(memory["unshared"], memory["torch"])
    result.finish(
        "cadpo",
        value=round(faster, 2),
        unit="x the pairs a second of torch",
        goal=OVER_TORCH,
        reached=faster >= OVER_TORCH and reached >= SHARE_OF_COUNTED and leanest,
        quick=quick,
        device=result.device(),
        pairs_a_second={
            name: round(1 / statistics.median(s["wall"] for s in got), 4)
            for name, got in steps.items()
        },
        memory_gib=memory,
        gflop={name: round(value / 1e9, 1) for name, value in count.items()},
        over_unshared=round(over("unshared", "wall"), 2),
        promised_over_unshared=round(promised, 2),
        promised_over_duplicate_everything=round(
            count["duplicate_everything"] / count["shared"], 2
        ),
        share_of_promise=round(reached, 3),
        **goal,
        cpu_over_unshared=round(over("unshared", "cpu"), 2),
        cpu_over_torch=round(over("torch", "cpu"), 2),
        prompt_tokens=int((shared.text.branch == Branch.SHARED).sum()),
    )


if __name__ == "__main__":
    main()
