"""Generated tokens per second, relative to transformers' `generate` and to static batches.

    python -m benchmarks.generate [--quick] [--only=refilling]

Both have the same random float32 weights (47 million), prompts and cores, and decode greedily. The
prompts are clips of SABER-like lengths (log-normal seconds, median 4.5) with their sound, two
batches of them: theirs are answered one after the other, ours as Generator answers any records,
two at a time. `one_batch` is the ratio when there is only one. Ours is timed from records to text,
so log-mel and patches are in it; theirs from ready tensors to tokens, as its processor's work is
not what is compared. Answers have 256 tokens, and in `short` 32: there most of the work is reading
the prompts.

`refilling` answers short clips whose answers are of very different lengths, many at a time: once
with the places of finished answers given to the clips that follow, and once batch by batch, each
waiting for its longest answer. Prompts have 293 tokens, and SABER's have 491 on average
(benchmarks/lengths.py), so answers are shortened in the same proportion. Random weights end no
answer, so the lengths are given. The network has a quarter of the weights, because there are many
answers.

--quick measures `short` and a smaller `refilling` of shorter answers, once, which has no goal: with
few answers, many places are empty at the end. It is ok if the tokens are right.

Needs what launch/setup.sh --bench installs.
"""

import argparse
import dataclasses
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import lengths, result
from saber_jax.data import media
from saber_jax.data.examples import encode_record
from saber_jax.data.records import Record, clip_size
from saber_jax.data.tokenizer import SPECIALS
from saber_jax.generate import decoding
from saber_jax.generate.generator import Generator
from saber_jax.hf.config import to_hf
from saber_jax.hf.names import to_disk
from saber_jax.models import saber
from saber_jax.models.config import (
    AudioConfig,
    SaberConfig,
    TextConfig,
    VisionConfig,
    saber_config,
)
from saber_jax.models.vision import normalize

GOAL, SHORT_GOAL, REFILL_GOAL = 2.0, 1.5, 1.5
LONG, SHORT = 256, 32  # Tokens of an answer.
BATCHES = 2
# Greedy tokens of two implementations differ from where two logits are equal but for rounding.
LEAST_AGREEMENT = 0.98

CONFIG = SaberConfig(
    text=TextConfig(
        layers=8,
        width=512,
        heads=8,
        kv_heads=2,
        head_dim=64,
        mlp_dim=2048,
        vocab=8192,
        rope_theta=1e6,
        mrope_section=(8, 12, 12),
        norm_eps=1e-6,
        max_positions=8192,
    ),
    vision=VisionConfig(
        depth=4, width=256, heads=4, mlp_dim=684, out_width=512, full_attention_layers=(1, 3)
    ),
    audio=AudioConfig(layers=4, width=256, heads=4, mlp_dim=1024, out_width=512),
    tokens=saber_config("tiny").tokens,
)

QUARTER = dataclasses.replace(
    CONFIG,
    text=dataclasses.replace(CONFIG.text, width=256, heads=4, mlp_dim=1024, vocab=4096),
    vision=dataclasses.replace(CONFIG.vision, width=128, heads=2, mlp_dim=342, out_width=256),
    audio=dataclasses.replace(CONFIG.audio, width=128, heads=2, mlp_dim=512, out_width=256),
)
SHORTENED = 293 / 491  # Tokens of a prompt here, and of SABER's.


class Letters:
    """A vocabulary without training: special tokens, then one id a character. Keeps ids as text."""

    path = Path()  # It has no file.
    vocab_size = CONFIG.text.vocab
    _SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._SPECIAL.split(text):
            ids += [self.id(part)] if part in SPECIALS else [20 + ord(c) % 8000 for c in part]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))

    def id(self, special: str) -> int:
        return 1 + SPECIALS.index(special)


def clips(count: int) -> list[Record]:
    """Random pixels and noise; 60 tokens a frame pair and 25 a second of sound."""
    rng = np.random.default_rng(0)
    seconds = np.clip(np.exp(np.log(4.5) + 0.6 * rng.standard_normal(count)), 1, 30)
    return [clip(rng, number, float(s)) for number, s in enumerate(seconds)]


def clip(rng: np.random.Generator, number: int, seconds: float) -> Record:
    frames = max(4, 2 * int(seconds))
    return Record(
        clip_id=f"clip{number}",
        language="en",
        frames=rng.integers(0, 256, (frames, 168, 280, 3), np.uint8),
        seconds_per_grid=seconds / (frames // 2),
        audio=rng.integers(-9000, 9000, int(seconds * media.SAMPLE_RATE), np.int16),
        annotation={},
        labels={},
        provenance={},
    )


def weights(config: SaberConfig = CONFIG) -> saber.Params:
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        scale = 1.0 if "norm" in name and "bias" not in name else 0.0
        noise = rng.standard_normal(leaf.shape, np.float32)
        return scale + np.float32(0.04) * noise

    return jax.tree_util.tree_map_with_path(draw, saber.abstract(config))


def reference(params: saber.Params, size: SaberConfig = CONFIG) -> Any:
    """The same network in transformers, with its fastest attention for CPUs."""
    import torch
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = Qwen2_5OmniThinkerConfig(**to_hf(size, dtype="float32"))
    model = Qwen2_5OmniThinkerForConditionalGeneration._from_config(
        config, attn_implementation="sdpa"
    ).eval()
    disk = {entry.name: torch.from_numpy(a.copy()) for entry, a in to_disk(params, size)}
    model.load_state_dict({_in_memory(name): tensor for name, tensor in disk.items()})
    return model


def _in_memory(name: str) -> str:
    """The name in memory: transformers 5 nests modules that are flat on disk."""
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return name if name.startswith("lm_head.") else "model." + name


def inputs(records: Sequence[Record]) -> dict[str, Any]:
    """The tensors of transformers' processor: left-padded tokens, normalised patches, log-mel."""
    import torch

    examples = [encode_record(record, Letters(), responses=()) for record in records]
    prompts = [example.prompt.tokens for example in examples]
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), CONFIG.tokens.pad, np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    mels = [media.log_mel(record.audio) for record in records]
    features = np.zeros((len(mels), 128, max(map(len, mels))), np.float32)
    heard = np.zeros((len(mels), features.shape[2]), np.int64)
    for row, mel in enumerate(mels):
        features[row, :, : len(mel)], heard[row, : len(mel)] = mel.T, 1
    patches = np.concatenate([media.patchify(record.frames) for record in records])
    sizes = [
        (len(r.frames) // 2, r.frames.shape[1] // 14, r.frames.shape[2] // 14) for r in records
    ]
    arrays = {
        "input_ids": tokens,
        "attention_mask": mask,
        "pixel_values_videos": np.array(normalize(jnp.asarray(patches[None])))[0],
        "video_grid_thw": np.array(sizes),
        "video_second_per_grid": np.array([r.seconds_per_grid for r in records], np.float32),
        "input_features": features,
        "feature_attention_mask": heard,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def compare(
    params: saber.Params,
    model: Any,
    records: list[Record],
    *,
    new_tokens: int,
    repeats: int,
    alone: bool = True,
) -> dict[str, Any]:
    """Tokens per second of both, measured in turns, so that other load affects both alike.

    With `alone`, the first batch is also timed by itself.
    """
    size = len(records) // BATCHES
    generator = Generator(params, CONFIG, Letters(), max_new_tokens=new_tokens, batch_size=size)
    given = [inputs(records[first : first + size]) for first in range(0, len(records), size)]

    def ours(records: Sequence[Record]) -> list[list[int]]:
        return [[int(i) for i in text.split()] for text in generator.respond(records)]

    generator.reserve(map(clip_size, records))
    ours(records[:size])  # Compiles.
    first_batch, runs = [], []
    for _ in range(repeats):
        both = _timed(lambda: ours(records))
        theirs = [_timed(lambda batch=batch: _answers(model, batch, new_tokens)) for batch in given]
        runs.append((both.wall, sum(run.wall for run in theirs)))
        if alone:
            first = _timed(lambda: ours(records[:size]))
            first_batch.append(theirs[0].wall / first.wall)
    answers, count = both.answers, sum(map(len, both.answers))
    expected = [row for run in theirs for row in run.answers]
    same = [np.mean(np.array(a) == b[: len(a)]) for a, b in zip(answers, expected, strict=True)]
    wall = np.median(runs, axis=0).tolist()
    return {
        "ours": round(count / wall[0], 1),
        "transformers": round(count / wall[1], 1),
        "ratio": round(statistics.median(b / a for a, b in runs), 2),
        **({"one_batch": round(statistics.median(first_batch), 2)} if alone else {}),
        "tokens_that_agree": round(float(np.mean(same)), 4),
        "prompt_tokens": [n for batch in given for n in batch["attention_mask"].sum(1).tolist()],
    }


def refilling(*, rows: int, batches: int, share: float) -> dict[str, Any]:
    """The speed-up of the same answers when the place of a finished one is given to the next.

    Answers have that `share` of the tokens of SABER's.
    """
    rng, params = np.random.default_rng(1), weights(QUARTER)
    tokens = (lengths.answers(rows * batches, rng) * share).astype(np.int32)
    records = [clip(rng, number, 1.0) for number in range(len(tokens))]
    table = jnp.asarray(tokens)
    usual = decoding.next_token

    def ending(params, hidden, answers, numbers, pick, program):
        chosen = usual(params, hidden, answers, numbers, pick, program)
        return jnp.where(numbers + 1 < table[answers], chosen, pick.end)

    # Programs that were compiled with the other function must not be used again.
    jax.clear_caches()
    decoding.next_token = ending
    most = int(lengths.LONGEST_ANSWER * share)
    generator = Generator(params, QUARTER, Letters(), max_new_tokens=most, batch_size=rows)
    generator.reserve(map(clip_size, records))
    parts = [(first, records[first : first + rows]) for first in range(0, len(records), rows)]

    def answers(parts: Sequence[tuple[int, Sequence[Record]]]) -> list[list[str]]:
        said = generator.sample_batches(parts, 1, sampling=decoding.GREEDY)
        return [text for batch in said for text in batch]

    answers(parts[:1])  # Compiles.
    together = _timed(lambda: answers(parts))
    waiting = _timed(lambda: [text for part in parts for text in answers([part])])
    decoding.next_token = usual
    jax.clear_caches()
    return {
        "ratio": round(waiting.wall / together.wall, 2),
        "tokens_equal": together.answers == waiting.answers,
        "tokens_per_second": round(float(tokens.sum()) / together.wall, 1),
        "rows": rows,
        "answers": len(tokens),
        "answer_tokens": {"mean": round(float(tokens.mean()), 1), "most": int(tokens.max())},
    }


def _answers(model: Any, batch: dict[str, Any], new_tokens: int) -> list[list[int]]:
    import torch

    with torch.inference_mode():
        out = model.generate(
            **batch, do_sample=False, max_new_tokens=new_tokens, eos_token_id=CONFIG.tokens.eos
        )
    return out[:, batch["input_ids"].shape[1] :].tolist()


@dataclasses.dataclass(frozen=True)
class Run:
    wall: float
    answers: list[list[Any]]


def _timed(work: Callable[[], list[list[Any]]]) -> Run:
    """Seconds that a call took, and its result."""
    start = time.perf_counter()
    answers = work()
    return Run(time.perf_counter() - start, answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer tokens, one repetition")
    parser.add_argument("--only", choices=("refilling",), help="leave transformers out")
    flags = parser.parse_args()
    quick = flags.quick
    refilled = (
        refilling(rows=16, batches=3, share=SHORTENED / 3)
        if quick
        else refilling(rows=48, batches=6, share=SHORTENED)
    )
    print(f"refilling: {refilled}", flush=True)
    common = {"quick": quick, "device": result.device(), "refilling": refilled}
    refills = quick or refilled["ratio"] >= REFILL_GOAL
    if flags.only:
        result.finish(
            "generate_refilling",
            value=refilled["ratio"],
            unit="x the speed of waiting for each batch's longest answer",
            goal=REFILL_GOAL,
            reached=refills,
            correct=refilled["tokens_equal"],
            **common,
        )
    params, repeats = weights(), 1 if quick else 3
    model = reference(params)
    cases = {"short": (8, SHORT)}
    if not quick:
        cases |= {"batch_1": (1, LONG), "batch_8": (8, LONG)}
    found = {}
    for name, (batch, new_tokens) in cases.items():
        records = clips(BATCHES * batch)
        found[name] = compare(
            params, model, records, new_tokens=new_tokens, repeats=repeats, alone=not quick
        )
        print(f"{name}: {found[name]}", flush=True)
    ratios = {name: figures["ratio"] for name, figures in found.items()}
    agreement = min(figures["tokens_that_agree"] for figures in found.values())
    last, goal = ("short", SHORT_GOAL) if quick else ("batch_8", GOAL)
    result.finish(
        "generate",
        value=ratios[last],
        unit=f"x transformers' tokens a second, batches of 8, {cases[last][1]} tokens",
        goal=goal,
        reached=ratios[last] >= goal and ratios["short"] >= SHORT_GOAL and refills,
        correct=refilled["tokens_equal"] and agreement >= LEAST_AGREEMENT,
        goals={"batch_8": GOAL, "short": SHORT_GOAL, "refilling": REFILL_GOAL},
        **common,
        **found,
    )


if __name__ == "__main__":
    main()
