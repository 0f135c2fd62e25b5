"""Makes network.npz: what transformers says about tests/models/cases.py.

    python -m tests.golden.make_network

Per case and row: positions, logits, loss; of every gradient its products with a few fixed random
directions (`projected`), which no wrong gradient can match by chance; and greedy answers.
"""

from pathlib import Path

import numpy as np

from saber_jax.hf.names import entries
from tests.hf import reference
from tests.models.batches import CONFIG
from tests.models.cases import CASES, PROMPTS
from tests.models.test_golden import projected

OUT = Path(__file__).with_name("network.npz")


def made() -> dict[str, np.ndarray]:
    model, arrays = reference.thinker(), {}
    for case, talks in CASES.items():
        answer = reference.ask(model, talks)
        arrays[f"{case}.loss"] = np.array(answer.loss, np.float64)
        for row, (positions, logits) in enumerate(
            zip(answer.positions, answer.logits, strict=True)
        ):
            arrays[f"{case}.{row}.positions"] = positions.astype(np.int16)
            arrays[f"{case}.{row}.logits"] = logits
        # What takes no part in a case has no gradient there, or zeros here.
        gradients = [answer.gradients.get(name, np.zeros(1)) for name in sorted(entries(CONFIG))]
        arrays[f"{case}.gradients"] = np.stack([projected(gradient) for gradient in gradients])
        arrays[f"{case}.largest"] = np.array([np.abs(gradient).max() for gradient in gradients])
    arrays["answers"] = reference.generate(model, PROMPTS).astype(np.int16)
    return arrays


if __name__ == "__main__":
    np.savez_compressed(OUT, **made())
    print(f"{OUT}: {OUT.stat().st_size / 1e3:.0f} kB")
