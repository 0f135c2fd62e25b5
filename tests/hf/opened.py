"""What the transformers of this interpreter makes of an export. Runs without our code.

    python opened.py DIR ...

prints JSON: the version, and for each directory the prompt's ids, the sum of all absolute logits,
and the greedy answer.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

NEW_TOKENS = 6


def open_and_ask(directory: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(rng.integers(0, 256, (4, 3, 112, 112), dtype=np.uint8))
    sound = rng.normal(0, 0.1, 16_000).astype(np.float32)
    processor = transformers.AutoProcessor.from_pretrained(directory)
    parts = [{"type": "video"}, {"type": "audio"}, {"type": "text", "text": "Whose voice?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(
        text=prompt,
        videos=[frames],
        audio=[sound],
        videos_kwargs={"do_resize": False, "fps": 2.0},
        return_tensors="pt",
    )
    config = json.loads((Path(directory) / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model: Any = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    thinker = getattr(model, "thinker", model)
    with torch.no_grad():
        logits = thinker(**inputs, use_cache=False).logits
        out = thinker.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    ids = inputs["input_ids"][0].tolist()
    return {
        "processor": type(processor).__name__,
        "ids": ids,
        "logits": logits.double().abs().sum().item(),
        "answer": out[0, len(ids) :].tolist(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = [open_and_ask(directory) for directory in sys.argv[1:]]
    print(json.dumps({"version": transformers.__version__, "exports": found}))
