"""HuggingFace -> Orbax -> HuggingFace of a 7B-shaped bfloat16 checkpoint, against copying it.

    python -m benchmarks.convert_7b [--quick] [--dir DIR]

Needs 60 GB on DIR's disk (a temporary directory by default) and leaves nothing there. Both ways run
as the commands that a person would type. The value is the speed of the slower one, relative to
copying the same bytes on the same disk in the same run. Before a file is read, its pages are
dropped from the system's cache; writing ends when all bytes are on the disk. `ok` also asks that
the result is equal byte for byte and that neither command's memory (peak resident set) passes 6
GiB.
"""

import argparse
import dataclasses
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.result import device, finish
from saber_jax.data.tokenizer import train_sentencepiece
from saber_jax.hf import tensors
from saber_jax.hf.config import to_hf
from saber_jax.hf.names import entries
from saber_jax.hf.tokenizer import write_tokenizer
from saber_jax.models.config import SaberConfig, saber_config

MEMORY_GOAL = 6.0
SPEED_GOAL = 0.5
SHARD_BYTES = 5 * 10**9


def small(cfg: SaberConfig) -> SaberConfig:
    """The same matrices, but few of them."""
    return dataclasses.replace(
        cfg,
        text=dataclasses.replace(cfg.text, layers=1, vocab=4096),
        vision=dataclasses.replace(cfg.vision, depth=1, full_attention_layers=(0,)),
        audio=dataclasses.replace(cfg.audio, layers=1),
        tokens=saber_config("tiny").tokens,
    )


def make_source(cfg: SaberConfig, out: Path) -> int:
    """A random checkpoint as the released ones are laid out; returns its bytes of weights."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(to_hf(cfg, dtype="bfloat16"), indent=1))
    texts = ["A woman smiles, but her voice trembles."] * 40
    write_tokenizer(train_sentencepiece(texts, out / "t.model", vocab_size=320, symbols=()), out)
    (out / "t.model").unlink()
    shapes = {name: entry.shape for name, entry in sorted(entries(cfg).items())}
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = ("BF16", shape)
        used += size
    rng = np.random.default_rng(0)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, held in zip(files, shards, strict=True):
        arrays = (_random(rng, shape) for _, shape in held.values())
        tensors.write(out / file, tensors.header(held), arrays)
    places = {name: file for file, held in zip(files, shards, strict=True) for name in held}
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / tensors.INDEX).write_text(json.dumps(index))
    return total


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    # Random bits of finite numbers: the exponent of infinity and NaN is left out.
    bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16)
    return bits & np.uint16(0xBFFF)


def settle(directory: Path) -> None:
    """Flushes the files of `directory` to the disk and drops them from the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def timed(work: Callable[[], Any], source: Path, out: Path) -> tuple[float, Any]:
    """Seconds of `work` that reads `source` and leaves `out` on the disk, and what it returns."""
    settle(source)
    began = time.perf_counter()
    result = work()
    settle(out)
    return time.perf_counter() - began, result


def command(*arguments: str) -> tuple[float, float]:
    """Runs `python -m ...`; returns its peak resident memory in GiB and its processor seconds.

    Memory is an upper bound: it begins at what this process held when it started that one.
    """
    process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"python -m {' '.join(arguments)} failed")
    return usage.ru_maxrss / 2**20, usage.ru_utime + usage.ru_stime


def copy(source: Path, out: Path) -> float:
    seconds, _ = timed(lambda: shutil.copytree(source, out), source, out)
    shutil.rmtree(out)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one layer a tower")
    parser.add_argument("--dir", type=Path, help="where to work")
    args = parser.parse_args()
    cfg = saber_config("7b")
    if args.quick:
        cfg = small(cfg)
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        run(cfg, Path(scratch), quick=args.quick)


def run(cfg: SaberConfig, scratch: Path, *, quick: bool) -> None:
    source, work, result = scratch / "source", scratch / "work", scratch / "result"
    gigabytes = make_source(cfg, source) / 1e9
    print(f"{gigabytes:.1f} GB of weights in {len(entries(cfg))} tensors", flush=True)
    began = time.perf_counter()
    command("saber_jax.hf.load", "--help")
    starting = time.perf_counter() - began

    copies = [copy(source, scratch / "copy")]
    loading = ("saber_jax.hf.load", "--hf_dir", str(source), "--out", str(work))
    load_seconds, (load_memory, load_cpu) = timed(lambda: command(*loading), source, work)
    copies.append(copy(source, scratch / "copy"))
    exporting = ("saber_jax.hf.export", "--checkpoint", str(work), "--out", str(result))
    exporting += ("--source", str(source))
    export_seconds, (export_memory, export_cpu) = timed(lambda: command(*exporting), work, result)
    shutil.rmtree(work)  # The last copy needs the space.
    copies.append(copy(source, scratch / "copy"))

    copy_seconds = statistics.median(copies)
    for name, seconds, memory in (
        ("copy", copy_seconds, None),
        ("load", load_seconds, load_memory),
        ("export", export_seconds, export_memory),
    ):
        used = "" if memory is None else f", peak memory {memory:.2f} GiB"
        print(f"{name:6} {seconds:7.1f} s, {gigabytes / seconds * 1e3:5.0f} MB/s{used}")
    names = sorted(path.name for path in source.iterdir())
    _, differ, missing = filecmp.cmpfiles(source, result, names, shallow=False)
    identical = not differ and not missing and sorted(p.name for p in result.iterdir()) == names
    print(f"source and result {'are' if identical else 'are NOT'} equal byte for byte")
    # Starting Python and importing JAX is no part of the copy either.
    slower = max(load_seconds, export_seconds) - starting
    ratio, memory = copy_seconds / slower, max(load_memory, export_memory)
    finish(
        "convert_7b",
        value=round(ratio, 3),
        unit="speed of the slower way over the speed of copying",
        goal=SPEED_GOAL,
        reached=ratio >= SPEED_GOAL,
        # One layer loads and exports in as little memory as all of them.
        correct=memory < MEMORY_GOAL and identical,
        quick=quick,
        device=device(),
        gigabytes=round(gigabytes, 2),
        seconds={
            "copies": [round(s, 1) for s in copies],
            "load": round(load_seconds, 1),
            "export": round(export_seconds, 1),
            "starting": round(starting, 1),
        },
        processor_seconds={"load": round(load_cpu, 1), "export": round(export_cpu, 1)},
        peak_memory_gib={"load": round(load_memory, 2), "export": round(export_memory, 2)},
        memory_goal_gib=MEMORY_GOAL,
        identical=identical,
    )


if __name__ == "__main__":
    main()
