"""An export in the omni layout is served by vLLM, and answers what transformers answers.

`SABER_VLLM_ENV=DIR` keeps the environment, which takes minutes and gigabytes to make, in DIR.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from saber_jax.data.tokenizer import train_sentencepiece
from saber_jax.hf.export import export
from saber_jax.models.config import saber_config
from tests.hf import vllm_environment
from tests.models import weights

pytestmark = pytest.mark.slow

QUESTIONS = Path(__file__).with_name("questions.py")
OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
    *("--gpu-memory-utilization", "0.1", "--skip-mm-profiling", "--trust-request-mm-kwargs"),
)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    kept = os.environ.get("SABER_VLLM_ENV")
    try:
        return vllm_environment.make(Path(kept) if kept else tmp_path_factory.mktemp("vllm"))
    except vllm_environment.NoVllmError as error:
        pytest.skip(f"vLLM cannot be installed here: {error}")


@pytest.fixture(scope="module")
def answers(python, tmp_path_factory):
    """The answers of transformers and of the server to every question."""
    place = tmp_path_factory.mktemp("served")
    texts = ["A woman smiles, but her voice trembles.", "声音里有悲伤。"] * 20
    tokenizer = train_sentencepiece(texts, place / "tokenizer.model", vocab_size=330, symbols=())
    cfg = saber_config("tiny")
    export(weights.tree(cfg), cfg, place / "omni", tokenizer, layout="omni")

    def ask(*arguments: str) -> dict:
        done = subprocess.run(
            [str(python), str(QUESTIONS), *arguments],
            capture_output=True,
            text=True,
            env=os.environ | vllm_environment.QUIET,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    theirs = ask("transformers", str(place / "omni"))
    with vllm_environment.serving(python, place / "omni", place / "log", *OPTIONS) as address:
        return theirs, ask(address, "saber")


@pytest.mark.parametrize("question", ["text", "video", "video and sound"])
def test_vllm_serves_what_transformers_says(answers, question):
    theirs, served = answers
    assert served[question] == theirs[question]


def test_vllm_writes_the_prompt_of_sound_in_a_video_as_transformers_does(answers):
    """The prompt is the same; vLLM 0.32 begins the block's positions one token early."""
    theirs, served = (said["sound in the video"] for said in answers)
    assert served[0] == theirs[0]
