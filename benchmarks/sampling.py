"""Answers per second when a clip is answered ten times: shared prompts and two other ways.

    python -m benchmarks.sampling [--quick]

CA-DPO mines its pairs from such answers. `separate` is our own generation of ten copies of the clip
in one batch; `transformers` is `generate(num_return_sequences=10)`. All three have the same random
float32 weights (47 million), prompts of 1,500 tokens and cores, and decode greedily, so that their
answers are equal: `tokens_that_agree` counts it. Ours are timed from records to text, so log-mel
and patches are in it; theirs from ready tensors to tokens. Needs launch/setup.sh --bench.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import generate, result
from saber_jax.data.examples import encode_record
from saber_jax.data.records import Record
from saber_jax.generate import decoding
from saber_jax.generate.generator import Generator

SAMPLES = 10
GOALS = {"separate": 3.0, "transformers": 4.0}
SECONDS = 16.0  # Such a clip makes a prompt of about 1,500 tokens.
QUICK_SECONDS = 5.0

Answers = list[list[list[int]]]
"""Tokens of each answer to each clip."""


def shared(generator: Generator, records: Sequence[Record]) -> Answers:
    numbered = ((number, [record]) for number, record in enumerate(records))
    batches = generator.sample_batches(numbered, SAMPLES, sampling=decoding.GREEDY)
    return [[_ids(text) for text in answers] for batch in batches for answers in batch]


def separate(generator: Generator, records: Sequence[Record]) -> Answers:
    batches = generator.respond_batches([r] * SAMPLES for r in records)
    return [[_ids(text) for text in answers] for answers in batches]


def transformers(model: Any, clips: Sequence[dict[str, Any]], new_tokens: int) -> Answers:
    import torch

    answers = []
    for clip in clips:
        with torch.inference_mode():
            # Drawing from the likeliest token alone is greedy; asked for greedy decoding, generate
            # refuses to return several sequences.
            out = model.generate(
                **clip,
                do_sample=True,
                top_k=1,
                num_return_sequences=SAMPLES,
                max_new_tokens=new_tokens,
                eos_token_id=generate.CONFIG.tokens.eos,
            )
        answers.append(out[:, clip["input_ids"].shape[1] :].tolist())
    return answers


def _ids(text: str) -> list[int]:
    return [int(token) for token in text.split()]


def agreement(answers: Answers, expected: Answers) -> float:
    """Share of the tokens of `answers` that are the same in `expected`."""
    same = [
        np.mean(np.array(a) == b[: len(a)])
        for ours, theirs in zip(answers, expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return round(float(np.mean(same)), 4)


def compare(
    *, clips: int, new_tokens: int, repeats: int, clip_seconds: float = SECONDS
) -> dict[str, Any]:
    """Answers per second of all three, measured in turns, so that other load affects all alike."""
    rng = np.random.default_rng(0)
    records = [generate.clip(rng, number, clip_seconds) for number in range(clips)]
    params = generate.weights()

    def generator(prompts: int) -> Generator:
        config, vocabulary = generate.CONFIG, generate.Letters()
        return Generator(params, config, vocabulary, max_new_tokens=new_tokens, batch_size=prompts)

    one, ten = generator(1), generator(SAMPLES)
    model = generate.reference(params)
    given = [generate.inputs([record]) for record in records]
    ways: dict[str, Callable[[], Answers]] = {
        "shared": lambda: shared(one, records),
        "separate": lambda: separate(ten, records),
        "transformers": lambda: transformers(model, given, new_tokens),
    }
    answers = {name: way() for name, way in ways.items() if name != "transformers"}  # Compiles.
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            answers[name] = way()
            seconds[name].append(time.perf_counter() - began)
    count = clips * SAMPLES
    ratios = {
        name: [theirs / ours for ours, theirs in zip(seconds["shared"], seconds[name], strict=True)]
        for name in GOALS
    }
    prompt = len(encode_record(records[0], generate.Letters(), responses=()).prompt.tokens)
    return {
        "answers_a_second": {n: round(count / statistics.median(s), 3) for n, s in seconds.items()},
        "ratio": {name: round(statistics.median(runs), 2) for name, runs in ratios.items()},
        "tokens_that_agree": {name: agreement(answers["shared"], answers[name]) for name in GOALS},
        "prompt_tokens": prompt,
        "answer_tokens": new_tokens,
        "clips": clips,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a short clip, short answers, one round"
    )
    quick = parser.parse_args().quick
    if quick:
        found = compare(clips=1, new_tokens=16, repeats=1, clip_seconds=QUICK_SECONDS)
    else:
        found = compare(clips=1, new_tokens=200, repeats=2)
    result.finish(
        "sampling",
        value=found["ratio"]["separate"],
        unit="x the answers a second of ten separate prompts",
        goal=GOALS["separate"],
        reached=all(found["ratio"][name] >= goal for name, goal in GOALS.items()),
        correct=all(share == 1 for share in found["tokens_that_agree"].values()),
        quick=quick,
        device=result.device(),
        goals=GOALS,
        **found,
    )


if __name__ == "__main__":
    main()
