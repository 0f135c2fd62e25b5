"""Writes tests/train/trl_goldens.json: what TRL's own code says of a few log-probs.

    pip install --no-deps --target OLD trl==0.24.0
    pip install --no-deps --target NEW trl==1.16.0
    python -m tests.train.make_trl_goldens OLD NEW

`of_sums` is the older version's `dpo_loss`, the last that smooths labels; it starts from sums.
`of_tokens` is the newer one's `_compute_loss`, which starts from every token's log-prob, as LD-DPO
and RPO need it; the older one's LD-DPO masks stand one token too far right. Methods are taken out
of TRL's files, so that none of what TRL imports has to be there.
"""

import ast
import collections
import contextlib
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import torch

CHOSEN, REJECTED = [-10.0, -7.0, -31.5], [-14.0, -3.0, -30.25]
REFERENCE_CHOSEN, REFERENCE_REJECTED = [-12.0, -6.0, -29.0], [-11.0, -5.0, -33.0]
LENGTHS_CHOSEN, LENGTHS_REJECTED = [4.0, 2.0, 9.0], [5.0, 3.0, 7.0]
SUMS = [
    {"form": "sigmoid", "beta": 0.1, "label_smoothing": 0.0},
    {"form": "sigmoid", "beta": 0.3, "label_smoothing": 0.1},
    {"form": "robust", "beta": 0.1, "label_smoothing": 0.2},
    {"form": "ipo", "beta": 0.1, "label_smoothing": 0.0},
    {"form": "hinge", "beta": 0.2, "label_smoothing": 0.0},
]

# Two answers that begin with the same two tokens; the second is the longer one.
POLICY = [[-0.5, -1.25, -2.0, -0.75, -3.5], [-0.5, -1.25, -4.0, -0.25, -1.5, -2.5, -0.125, -3.0]]
REFERENCE = [[-0.75, -1.0, -2.5, -1.5, -3.0], [-0.75, -1.0, -3.0, -0.5, -2.0, -1.0, -0.5, -4.0]]
TOKENS = [
    {"form": "sigmoid", "beta": 0.1},
    {"form": "sigmoid", "beta": 0.1, "length_alpha": 0.25},
    {"form": "sigmoid", "beta": 0.1, "length_alpha": 0.0},
    {"form": "sigmoid", "beta": 0.1, "sft": 0.2},
    {"form": "sigmoid", "beta": 0.3, "sft": 0.2, "length_alpha": 0.5},
    {"form": "hinge", "beta": 0.2, "sft": 0.1, "length_alpha": 0.5},
    {"form": "ipo", "beta": 0.1, "sft": 0.1},
    {"form": "ipo", "beta": 0.1, "length_alpha": 0.5},
    {"form": "robust", "beta": 0.1, "label_smoothing": 0.2, "length_alpha": 0.5},
]


def method(folder: str, name: str, names: dict[str, Any]) -> Any:
    """The method NAME of TRL's trainer as a function, which finds `names` as its globals."""
    tree = ast.parse((Path(folder) / "trl/trainer/dpo_trainer.py").read_text())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    names = names | {"torch": torch, "F": torch.nn.functional}
    exec(compile(ast.Module(found, []), "dpo_trainer.py", "exec"), names)
    return names[name]


def of_sums(folder: str) -> list[dict]:
    kinds = types.SimpleNamespace(ALPHA_DIVERGENCE="alpha", JS_DIVERGENCE="js")
    dpo_loss = method(folder, "dpo_loss", {"FDivergenceType": kinds})
    results = []
    for case in SUMS:
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
        losses, _, _ = dpo_loss(trainer, *arguments, loss_type=case["form"])
        results.append(case | {"losses": losses.tolist()})
    return results


def of_tokens(folder: str) -> list[dict]:
    names = {
        "math": math,
        "is_peft_model": lambda _: False,
        "disable_gradient_checkpointing": lambda *_: contextlib.nullcontext(),
    }
    compute_loss = method(folder, "_compute_loss", names)
    return [case | {"loss": float(compute_loss(*_inputs(case), False))} for case in TOKENS]


def _inputs(case: dict) -> tuple[Any, Any, dict]:
    """What `_compute_loss` reads: a trainer, a model, and a batch whose prompt is one token."""
    longest = max(map(len, POLICY))
    mask = torch.tensor([[0] + [1] * len(a) + [0] * (longest - len(a)) for a in POLICY])
    sft, alpha = case.get("sft"), case.get("length_alpha")
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        ref_model=lambda **_: _outputs(REFERENCE, longest),
        accelerator=types.SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        use_weighting=False,
        f_divergence_type="reverse_kl",
        beta=case["beta"],
        label_smoothing=case.get("label_smoothing", 0.0),
        ld_alpha=alpha,
        loss_types=[case["form"], *(["sft"] if sft else [])],
        loss_weights=[1.0, *([sft] if sft else [])],
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    batch = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }
    return trainer, lambda **_: _outputs(POLICY, longest), batch


def _outputs(answers: list[list[float]], longest: int) -> Any:
    rows = [answer + [0.0] * (longest - len(answer)) for answer in answers]
    log_probs = torch.tensor(rows, dtype=torch.float64)
    nothing = torch.zeros_like(log_probs)
    return types.SimpleNamespace(
        log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )


def main(older: str, newer: str) -> None:
    goldens = {"of_sums": of_sums(older), "of_tokens": of_tokens(newer)}
    path = Path(__file__).with_name("trl_goldens.json")
    path.write_text(json.dumps(goldens, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
