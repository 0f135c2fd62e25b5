"""Writes tests/train/trl_goldens.json: what TRL's own `dpo_loss` says of a few log-probs.

    pip install --no-deps --target DIR trl==0.24.0
    python -m tests.train.make_trl_goldens DIR

The method is taken out of TRL's file, so that none of what TRL imports has to be there.
"""

import ast
import json
import sys
import types
from pathlib import Path

import torch

CHOSEN, REJECTED = [-10.0, -7.0, -31.5], [-14.0, -3.0, -30.25]
REFERENCE_CHOSEN, REFERENCE_REJECTED = [-12.0, -6.0, -29.0], [-11.0, -5.0, -33.0]
LENGTHS_CHOSEN, LENGTHS_REJECTED = [4.0, 2.0, 9.0], [5.0, 3.0, 7.0]
CASES = [
    {"form": "sigmoid", "beta": 0.1, "label_smoothing": 0.0},
    {"form": "sigmoid", "beta": 0.3, "label_smoothing": 0.1},
    {"form": "robust", "beta": 0.1, "label_smoothing": 0.2},
    {"form": "ipo", "beta": 0.1, "label_smoothing": 0.0},
    {"form": "hinge", "beta": 0.2, "label_smoothing": 0.0},
]


def main(folder: str) -> None:
    tree = ast.parse((Path(folder) / "trl/trainer/dpo_trainer.py").read_text())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "dpo_loss"]
    kinds = types.SimpleNamespace(ALPHA_DIVERGENCE="alpha", JS_DIVERGENCE="js")
    names = {"torch": torch, "F": torch.nn.functional, "FDivergenceType": kinds}
    exec(compile(ast.Module(found, []), "dpo_trainer.py", "exec"), names)
    results = []
    for case in CASES:
        trainer = types.SimpleNamespace(
            accelerator=types.SimpleNamespace(device="cpu"),
            f_divergence_type="reverse_kl",
            reference_free=False,
            beta=case["beta"],
            label_smoothing=case["label_smoothing"],
        )
        values = [CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED]
        arguments = [torch.tensor(v, dtype=torch.float64) for v in values]
        if case["form"] == "ipo":  # TRL's forward pass averages over tokens for this form.
            lengths = [LENGTHS_CHOSEN, LENGTHS_REJECTED] * 2
            arguments = [a / torch.tensor(n) for a, n in zip(arguments, lengths, strict=True)]
        losses, _, _ = names["dpo_loss"](trainer, *arguments, loss_type=case["form"])
        results.append(case | {"losses": losses.tolist()})
    path = Path(__file__).with_name("trl_goldens.json")
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
