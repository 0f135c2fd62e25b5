"""Training data in TensorBoard: some examples as text, and the sizes of all."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from saber_jax.data import chat
from saber_jax.data.examples import Example, Size
from saber_jax.data.tokenizer import Tokenizer
from saber_jax.train.metrics import MetricsWriter

MOST_EXAMPLES = 4
ROLES = {1: ("target",), 2: ("chosen", "rejected")}


def show(
    writer: MetricsWriter,
    step: int,
    examples: Sequence[Example],
    sizes: Int[np.ndarray, "N D"],
    tokenizer: Tokenizer,
) -> None:
    """Texts "examples/..." and histograms "sizes/..." at `step`; columns of `sizes` as in Size."""
    for number in range(min(MOST_EXAMPLES, len(examples))):
        writer.text(step, f"examples/{number}", as_text(examples[number], tokenizer))
    names = (field.name for field in dataclasses.fields(Size))
    columns = {f"sizes/{name}": column for name, column in zip(names, sizes.T, strict=True)}
    writer.histograms(step, columns)


def as_text(example: Example, tokenizer: Tokenizer) -> str:
    """Clip, prompt with its media left out, and every response."""
    prompt = example.prompt
    said = tokenizer.decode(prompt.tokens[prompt.media_kind == chat.TEXT])
    parts = [f"clip: {example.clip_id}", f"prompt: {said}"]
    roles = ROLES.get(len(example.responses), ())
    for role, response in zip(roles, example.responses, strict=False):
        parts.append(f"{role}: {tokenizer.decode(response.tokens)}")
    return "\n".join(parts)
