"""Bad input: files mutated by hypothesis, and settings that make no sense."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
from hypothesis import strategies as st

from benchmarks.faults.outcomes import Outcomes
from configs import cadpo, ranges, sft
from data_prep.corpus import film
from saber_jax.data import isolation
from saber_jax.data.decode import FrameSampling, decode_clip
from saber_jax.data.pairs import read_pairs
from saber_jax.data.tokenizer import load_tokenizer
from saber_jax.hf import load as hf_load
from saber_jax.hf.config import to_hf
from saber_jax.models.config import SaberConfig, saber_config
from saber_jax.train import checkpoint

TOKENS = [b"null", b"-1", b"1e400", b"{}", b"[]", b'""', b"NaN", b"\xff\xfe", b"\0", b"[" * 2000]
"""Bytes that are inserted because parsers often fail on them."""
NONSENSE = (-1, -(2**40), float("nan"), float("inf"), -float("inf"))
Edit = tuple[float, int, bytes]


def edits() -> st.SearchStrategy[list[Edit]]:
    """A few edits: (place as a share of the file, number of removed bytes, inserted bytes)."""
    put = st.one_of(st.sampled_from(TOKENS), st.binary(max_size=12))
    edit = st.tuples(st.floats(0, 1), st.one_of(st.integers(0, 12), st.just(1 << 30)), put)
    return st.lists(edit, min_size=1, max_size=5)


def edited(original: bytes, changes: list[Edit]) -> bytes:
    data = bytearray(original)
    for place, removed, put in changes:
        at = int(place * len(data))
        data[at : at + removed] = put
    return bytes(data)


def mutated(records: Path, folder: Path, count: int, seed: int) -> Outcomes:
    """Pairs, vocabularies, model.json, a HuggingFace config and a film, each `count` / 5 times.

    Text inside a pair may change without anybody's knowing: what counts is that nothing but a named
    error comes.
    """
    counts = Outcomes()
    for path, read in _readers(records, folder).items():
        counts += _mutated(path, read, count // 5, seed)
    return counts


def _readers(records: Path, folder: Path) -> dict[Path, Callable[[], Any]]:
    cfg = saber_config("tiny")
    run, hub = folder / "run", folder / "hub"
    for made in (run, hub):
        made.mkdir(parents=True)
    pairs, words, clip = (folder / name for name in ("pairs.jsonl", "tokenizer.model", "clip.mp4"))
    rows = [{"clip_id": f"c{i}", "chosen": "calm", "rejected": "loud", "kappa": 0.5} for i in "ab"]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words.write_bytes((records / words.name).read_bytes())
    checkpoint.write_model_file(run, cfg)
    (hub / "config.json").write_text(json.dumps(to_hf(cfg, dtype="float32")))
    noise = np.random.default_rng(0)
    pictures = noise.integers(0, 256, (20, 64, 64, 3), np.uint8)
    film.write_mp4(clip, pictures, noise.integers(-9000, 9000, 32_000, np.int16))
    worker = isolation.Worker(seconds=60)
    return {
        pairs: lambda: read_pairs(pairs),
        words: lambda: load_tokenizer(words),
        run / "model.json": lambda: SaberConfig.from_dict(checkpoint.read_model_file(run)["model"]),
        hub / "config.json": lambda: hf_load.open_checkpoint(hub),
        clip: lambda: worker.call(decode_clip, clip, FrameSampling()),
    }


def _mutated(path: Path, read: Callable[[], Any], count: int, seed: int) -> Outcomes:
    counts, original = Outcomes(), path.read_bytes()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    @hypothesis.given(edits())
    def read_once(changes: list[Edit]) -> None:
        path.write_bytes(edited(original, changes))
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # It warns of pairs without checksums.
                read()
            counts["fine"] += 1
        except (ValueError, FileNotFoundError) as error:
            named = path.name in str(error) or str(path.parent) in str(error)
            # A crashed decoder cannot name its file; its caller can.
            crashed = "the decoder crashed" in str(error) or "decoding took" in str(error)
            counts["named" if named or crashed else "unnamed"] += 1
        except Exception:
            counts["unnamed"] += 1

    read_once()
    path.write_bytes(original)
    return counts


def absurd_settings() -> Outcomes:
    """Sets every number of both configs to senseless values, one at a time."""
    counts = Outcomes()
    for stage in (sft, cadpo):
        found = ranges.numbers(stage.get_config("tiny").to_dict())
        for name, value in found:
            for absurd in NONSENSE:
                if isinstance(value, int) and not isinstance(absurd, int):
                    continue  # ml_collections refuses those by their type.
                if absurd == -1 and name.startswith("mesh."):
                    continue  # What the others leave.
                config = stage.get_config("tiny")
                config.update_from_flattened_dict({name: type(value)(absurd)})
                try:
                    ranges.check(config)
                    counts["silent"] += 1
                except ValueError as error:
                    counts["named" if f"config.{name} " in str(error) else "unnamed"] += 1
    return counts
