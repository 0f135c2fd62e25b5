"""Single bits flipped in what runs, builds and exports leave on a disk."""

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks.faults import training
from benchmarks.faults.outcomes import Outcomes, flip, flips
from saber_jax.data.pairs import read_pairs, write_pairs
from saber_jax.data.records import BadRecordError, Record, RecordSource, outlines_file, to_example
from saber_jax.data.tokenizer import copy as copy_tokenizer
from saber_jax.data.tokenizer import load_tokenizer
from saber_jax.hf import check, export
from saber_jax.hf import load as hf_load
from saber_jax.models import saber
from saber_jax.models.config import LoraConfig, SaberConfig, saber_config
from saber_jax.runs import checksums
from saber_jax.train import checkpoint


def checkpoints(records: Path, folder: Path, count: int, rng: np.random.Generator) -> Outcomes:
    """Flips a bit in any file of the newest step of the tiny network and its optimizer. Restoring
    has to return the state of that step, or that of the step before with a message."""
    intact, counts = folder / "intact", Outcomes()
    states = {step: training.state(records, step) for step in (1, 2)}
    writing = checkpoint.Checkpoints(intact, every=1)
    for step, state in states.items():
        writing.save(state, {"step": step})
    writing.close()
    want = {step: training.numbers(state) for step, state in states.items()}
    files = [p for p in sorted((intact / "checkpoints/2").rglob("*")) if p.is_file()]
    sizes = np.array([p.stat().st_size for p in files])
    for number in range(count):
        run = shutil.copytree(intact, folder / "flipped")
        # Weights are nearly all bytes. Half of the flips therefore choose among files, most of
        # which are small.
        heavy = sizes / sizes.sum() if number % 2 else None
        flip(run / files[rng.choice(len(files), p=heavy)].relative_to(intact), rng)
        reading = checkpoint.Checkpoints(run, every=1)
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                restored = reading.restore(training.layout(records), {})
        except Exception:
            counts["unnamed"] += 1
        else:
            if restored is None:
                counts["lost"] += 1
            elif training.numbers(restored) != want[int(restored.step)]:
                counts["silent"] += 1
            elif int(restored.step) == 2:
                counts["fine"] += 1
            else:
                counts["named" if "checkpoints/2 is damaged" in said.getvalue() else "silent"] += 1
        reading.close()
        shutil.rmtree(run)
    return counts


def stored_records(records: Path, folder: Path, count: int, rng: np.random.Generator) -> Outcomes:
    """Flips a bit in the records. Each record has to read as before, or be refused by name."""
    copy = shutil.copytree(records, folder / "records")
    source = RecordSource(copy, "train")
    [path] = source.directory.glob("*-train.array_record-*")
    want, before, counts = [_content(made) for made in source], path.read_bytes(), Outcomes()
    for _ in range(count):
        flip(path, rng)
        counts[_read_all(copy, want)] += 1
        path.write_bytes(before)
    return counts


def _content(made: Record) -> list[bytes]:
    return [np.asarray(value).tobytes() for value in to_example(made).values()]


def _read_all(folder: Path, want: list[list[bytes]]) -> str:
    try:
        source, refused = RecordSource(folder, "train"), 0
        for index, wanted in enumerate(want):
            try:
                if _content(source[index]) != wanted:
                    return "silent"
            except BadRecordError as error:
                refused += 1
                if f"-00000-of-00001[{index}]" not in str(error):
                    return "unnamed"
    except Exception:
        return "unnamed"
    return "named" if refused else "fine"


def outlines(records: Path, folder: Path, count: int, rng: np.random.Generator) -> Outcomes:
    """Flips a bit in the outlines, a cache of the records from which they must not differ."""
    copy = shutil.copytree(records, folder / "records")
    path = outlines_file(RecordSource(copy, "train").directory, "train")

    def read() -> list:
        source = RecordSource(copy, "train")
        return [source.sizes, *(source.outline(i).annotation for i in range(len(source)))]

    return flips(path, count, rng, read, read())


def exports(folder: Path, count: int, rng: np.random.Generator) -> Outcomes:
    """Flips a bit in any file that hf.export wrote; hf.load reads it."""
    cfg, out = saber_config("tiny"), folder / "hf"
    params = _numbers(cfg, rng)
    with contextlib.redirect_stderr(io.StringIO()):  # Its progress bar.
        export.export(params, cfg, out)

    def read() -> bytes:
        loaded, found = hf_load.load_params(out)
        leaves = b"".join(leaf.tobytes() for leaf in jax.tree.leaves(loaded))
        return leaves + json.dumps(found.to_dict(), sort_keys=True).encode()

    return _in_any_file(out, count, rng, read)


def adapters(folder: Path, count: int, rng: np.random.Generator) -> Outcomes:
    """Flips a bit in any file that hf.export --peft wrote; hf.check reads it."""
    bare, base, run, out = saber_config("tiny"), folder / "base", folder / "run", folder / "peft"
    cfg = dataclasses.replace(bare, lora=LoraConfig(rank=2, alpha=4.0, targets=("text/*",)))
    params = _numbers(cfg, rng)
    checkpoint.save_params(base, saber.without_lora(params), bare)
    described = checkpoint.describe_base(run, base)
    checkpoint.save_params(run, {"lora": params["lora"]}, cfg, base=described)
    flags = ["--checkpoint", str(run), "--out", str(out), "--peft", "--base", "some/model"]
    with contextlib.redirect_stdout(io.StringIO()):
        if export.main(flags):
            raise RuntimeError("the adapters were not exported")

    def read() -> int:
        tensors, wrong = check.problems(out)
        if wrong:
            raise ValueError("; ".join(wrong))
        return tensors

    return _in_any_file(out, count, rng, read)


def _numbers(cfg: SaberConfig, rng: np.random.Generator) -> dict:
    """Random parameters, drawn without compiling the initialisation."""
    return jax.tree.map(lambda x: rng.normal(0, 1, x.shape).astype(x.dtype), saber.abstract(cfg))


def _in_any_file(
    folder: Path, count: int, rng: np.random.Generator, read: Callable[[], object]
) -> Outcomes:
    """Half of the flips are in the largest file, the others in any."""
    want, counts = read(), Outcomes()
    files = sorted((p for p in folder.iterdir() if p.is_file()), key=lambda p: p.stat().st_size)
    for number in range(count):
        path = files[-1] if number % 2 else files[rng.integers(len(files))]
        counts += flips(path, 1, rng, read, want)
    return counts


def reference(folder: Path, count: int, rng: np.random.Generator) -> Outcomes:
    """Flips a bit in the reference cache. What is read has to be right, and the damaged file is
    set aside."""
    from saber_jax.train.references import ReferenceCache, ReferenceInputs

    source = ReferenceInputs(weights="w", processor="p", tokens="t", media="m", dtype="float32")
    want = {bytes([i] * 16): rng.standard_normal(50).astype("<f4") for i in range(20)}
    ReferenceCache(folder / "intact", "whole", source).add(want)
    counts = Outcomes()
    for _ in range(count):
        copy = shutil.copytree(folder / "intact", folder / "flipped")
        [file] = (copy / "whole").glob("*.array_record")
        flip(file, rng)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                got = ReferenceCache(copy, "whole", source).values
        except Exception:
            counts["unnamed"] += 1
        else:
            right = all(k in want and np.array_equal(v, want[k]) for k, v in got.items())
            complete = right and len(got) == len(want)
            aside = right and bool(list(copy.rglob("*.damaged")))
            counts["fine" if complete else "named" if aside else "silent"] += 1
        shutil.rmtree(copy)
    return counts


def pairs(folder: Path, count: int, rng: np.random.Generator) -> Outcomes:
    """Flips a bit in preference pairs or in their checksums."""
    folder.mkdir(exist_ok=True)
    path, words = folder / "pairs.jsonl", ("calm", "loud", "a red room", "平静")
    rows = [{"clip_id": f"c{i}", "chosen": words[i % 4], "rejected": "no"} for i in range(20)]
    write_pairs(path, rows)
    return _in_either(path, count, rng, lambda: read_pairs(path))


def tokenizer(records: Path, folder: Path, count: int, rng: np.random.Generator) -> Outcomes:
    """Flips a bit in a vocabulary or in its checksum."""
    folder.mkdir(exist_ok=True)
    path = copy_tokenizer(load_tokenizer(records).path, folder)

    def read() -> list[int]:
        return load_tokenizer(folder).encode("a person speaks loudly")

    return _in_either(path, count, rng, read)


def _in_either(
    path: Path, count: int, rng: np.random.Generator, read: Callable[[], object]
) -> Outcomes:
    """Every fourth flip is in the checksums, the others in the file itself."""
    want, counts = read(), Outcomes()
    for number in range(count):
        damaged = path if number % 4 else checksums.beside(path)
        counts += flips(damaged, 1, rng, read, want)
    return counts


def model_file(folder: Path, count: int, rng: np.random.Generator) -> Outcomes:
    """Flips a bit in a work directory's model.json."""
    folder.mkdir(exist_ok=True)
    checkpoint.write_model_file(folder, saber_config("tiny"))

    def read() -> SaberConfig:
        return SaberConfig.from_dict(checkpoint.read_model_file(folder)["model"])

    return flips(folder / checkpoint.MODEL_FILE, count, rng, read, read())
