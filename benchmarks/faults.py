"""What becomes of a run whose machine fails it: kills, flipped bits, full disks, bad inputs.

    python -m benchmarks.faults [--quick] [--seed N] [--kills N] [--out DIR]

Every fault is made for real: SIGKILL and SIGTERM to processes that train, single bits flipped in
files that a run left, a tmpfs that fills up, bytes of inputs changed, settings out of range. Each
outcome is one of:

    fine        the result is bit for bit the one without the fault
    named       one sentence names the file or the setting; nothing was lost but what it says
    unnamed     an error that does not say where
    silent      another result without a word
    hang        no end within the time that a fault may take
    lost        a restart that did not go on

The last four count as failures, and the goal is none of them. A table is printed, then one JSON
line; docs/reliability.md holds the promises and measured tables.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import result
from configs import cadpo, ranges, sft
from saber_jax import sharding
from saber_jax.data.pairs import read_pairs
from saber_jax.hf import load as hf_load
from saber_jax.train import checkpoint, saved
from saber_jax.train.step import TrainState

FAILURES = ("unnamed", "silent", "hang", "lost")
STEPS = 8
PATIENCE = 300
Tally = collections.Counter[str]


def state_of(step: int, size: int = 4096) -> TrainState:
    """A state that depends on its step in every number."""
    everywhere = sharding.replicated(sharding.make_mesh(data=1, fsdp=-1, tensor=1))
    w = jnp.sin(jnp.arange(size, dtype=jnp.float32) * (step + 1))
    tree = TrainState(jnp.int32(step), {"text/w": w}, {}, {"mu": w * 0.5})
    return jax.device_put(tree, everywhere)


def numbers(state: TrainState) -> bytes:
    leaves = jax.tree.leaves((state.trainable, state.opt_state))
    return b"".join(np.asarray(leaf).tobytes() for leaf in leaves)


def flip(path: Path, rng: np.random.Generator) -> None:
    """One bit of a file, where it holds something: ArrayRecord pads to 64 KiB with zeros."""
    data = bytearray(path.read_bytes())
    used = np.flatnonzero(np.frombuffer(data, np.uint8))
    data[rng.choice(used)] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def mutated(original: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, removed, repeated or exchanged for what parsers trip over."""
    data = bytearray(original)
    for _ in range(rng.integers(1, 6)):
        at, size = int(rng.integers(len(data) + 1)), int(rng.integers(1, 12))
        match rng.integers(6):
            case 0:
                data[at : at + 1] = bytes(rng.integers(0, 256, 1, np.uint8))
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size] * 3
            case 3:
                del data[at:]
            case 4:
                tokens = (b"null", b"-1", b"1e400", b"{}", b"[]", b'""', b"NaN", b"\xff\xfe", b"\0")
                data[at : at + size] = tokens[rng.integers(len(tokens))]
            case _:
                data[at:at] = bytes(rng.integers(0, 256, size, np.uint8))
    return bytes(data)


def outcome(read: Callable[[], Any], want: Any, path: Path) -> str:
    """What reading a changed file comes to. An error is named if it says which file."""
    try:
        got = read()
    except (ValueError, FileNotFoundError) as error:
        return "named" if path.name in str(error) or path.parent.name in str(error) else "unnamed"
    except Exception:
        return "unnamed"
    return "fine" if got == want else "silent"


def checkpoint_flips(folder: Path, count: int, rng: np.random.Generator) -> Tally:
    """A bit in any file of the newest step: the state of that step comes back, or the one before,
    which is said."""
    intact, tally = folder / "intact", Tally()
    writing = checkpoint.Checkpoints(intact, every=1)
    for step in (1, 2):
        writing.save(state_of(step), {"step": step})
    writing.close()
    want = {step: numbers(state_of(step)) for step in (1, 2)}
    files = [p for p in sorted((intact / "checkpoints/2").rglob("*")) if p.is_file()]
    sizes = np.array([p.stat().st_size for p in files])
    for _ in range(count):
        run = shutil.copytree(intact, folder / "flipped")
        chosen = files[rng.choice(len(files), p=sizes / sizes.sum())]
        flip(run / chosen.relative_to(intact), rng)
        reading = checkpoint.Checkpoints(run, every=1)
        try:
            restored = reading.restore(state_of(0), {})
        except Exception:
            tally["unnamed"] += 1
        else:
            if restored is None:
                tally["lost"] += 1
            elif numbers(restored) != want[int(restored.step)]:
                tally["silent"] += 1
            else:
                tally["fine" if int(restored.step) == 2 else "named"] += 1
        reading.close()
        shutil.rmtree(run)
    return tally


def export_flips(folder: Path, count: int, rng: np.random.Generator) -> Tally:
    """A bit in any file that hf.export wrote, read by hf.load."""
    from saber_jax.hf import export
    from saber_jax.models import saber
    from saber_jax.models.config import saber_config

    cfg, out, tally = saber_config("tiny"), folder / "hf", Tally()
    params = jax.jit(functools.partial(saber.init, cfg))(jax.random.key(0, impl="rbg"))
    with contextlib.redirect_stderr(io.StringIO()):  # Its progress bar.
        export.export(params, cfg, out)

    def read() -> bytes:
        loaded, found = hf_load.load_params(out)
        leaves = b"".join(leaf.tobytes() for leaf in jax.tree.leaves(loaded))
        return leaves + json.dumps(found.to_dict(), sort_keys=True).encode()

    want = read()
    files = [p for p in sorted(out.iterdir()) if p.is_file()]
    for number in range(count):
        # Weights are nearly all bytes; half of the flips are in the small files.
        path = (
            max(files, key=lambda p: p.stat().st_size)
            if number % 2
            else files[rng.integers(len(files))]
        )
        before = path.read_bytes()
        flip(path, rng)
        tally[outcome(read, want, path)] += 1
        path.write_bytes(before)
    return tally


def reference_flips(folder: Path, count: int, rng: np.random.Generator) -> Tally:
    """A bit in the reference cache: what is read back is right, the damaged file set aside."""
    from saber_jax.train.references import Cache, Source

    source = Source(weights="w", processor="p", tokens="t", media="m", dtype="float32")
    want = {bytes([i] * 16): rng.standard_normal(50).astype("<f4") for i in range(20)}
    Cache(folder / "intact", "whole", source).add(want)
    tally = Tally()
    for _ in range(count):
        copy = shutil.copytree(folder / "intact", folder / "flipped")
        [file] = (copy / "whole").glob("*.array_record")
        flip(file, rng)
        try:
            got = Cache(copy, "whole", source).values
        except Exception:
            tally["unnamed"] += 1
        else:
            right = all(np.array_equal(value, want.get(key)) for key, value in got.items())
            whole = right and len(got) == len(want)
            aside = right and bool(list(copy.rglob("*.damaged")))
            tally["fine" if whole else "named" if aside else "silent"] += 1
        shutil.rmtree(copy)
    return tally


def mutated_inputs(folder: Path, count: int, rng: np.random.Generator) -> Tally:
    """Bytes of pairs.jsonl, of a HuggingFace config and of model.json. Text inside a pair may
    change without anybody's knowing: what counts is that nothing but a named error comes."""
    pairs = folder / "pairs.jsonl"
    rows = [{"clip_id": f"c{i}", "chosen": "calm", "rejected": "loud", "kappa": 0.5} for i in "ab"]
    model = folder / "run/model.json"
    model.parent.mkdir()
    from saber_jax.hf.config import to_hf
    from saber_jax.models.config import SaberConfig, saber_config

    cfg = saber_config("tiny")
    config = folder / "hf_config/config.json"
    config.parent.mkdir()
    checkpoint.write_model_file(model.parent, cfg)
    kinds = {
        pairs: ("".join(json.dumps(r) + "\n" for r in rows), lambda: read_pairs(pairs)),
        model: (
            model.read_text(encoding="utf-8"),
            lambda: SaberConfig.from_dict(checkpoint.read_model_file(model.parent)["model"]),
        ),
        config: (
            json.dumps(to_hf(cfg, dtype="float32")),
            lambda: hf_load.open_source(config.parent),
        ),
    }
    tally = Tally()
    for number in range(count):
        path = list(kinds)[number % len(kinds)]
        text, read = kinds[path]
        path.write_bytes(mutated(text.encode(), rng))
        try:
            read()
            tally["fine"] += 1
        except (ValueError, FileNotFoundError) as error:
            named = path.name in str(error) or str(path.parent) in str(error)
            tally["named" if named else "unnamed"] += 1
        except Exception:
            tally["unnamed"] += 1
    return tally


def absurd_configs(rng: np.random.Generator, count: int) -> Tally:
    """Every number of both configs at values that make no sense, one at a time."""
    tally, nonsense = Tally(), (-1, -(2**40), float("nan"), float("inf"), -float("inf"))
    for stage in (sft, cadpo):
        found = ranges.numbers(stage.get_config("tiny").to_dict())
        for name, value in found:
            for absurd in nonsense:
                if isinstance(value, int) and not isinstance(absurd, int):
                    continue  # ml_collections refuses those by their type.
                if absurd == -1 and name.startswith("mesh."):
                    continue  # What the others leave.
                config = stage.get_config("tiny")
                config.update_from_flattened_dict({name: type(value)(absurd)})
                try:
                    ranges.check(config)
                    tally["silent"] += 1
                except ValueError as error:
                    tally["named" if f"config.{name} " in str(error) else "unnamed"] += 1
    return tally


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path | None]:
    """A file system of so many KiB; None where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disks(folder: Path, count: int, rng: np.random.Generator) -> Tally:
    """Runs on disks that fill up somewhere: metrics and TensorBoard are dropped, a save that fails
    is one sentence, and with room again the run goes on from the last whole step."""
    tally = Tally()
    for _ in range(count):
        kib = int(rng.integers(20, 300))
        with small_disk(folder / "disk", kib) as disk:
            if disk is None:
                return Tally(skipped=count)
            tally[filled(disk)] += 1
    return tally


def filled(disk: Path) -> str:
    child = [sys.executable, "-m", "benchmarks.faults", "--child", str(disk / "run")]
    try:
        first = subprocess.run(child, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return "hang"
    if first.returncode == 0:
        return "fine" if final(disk / "run") == reference_final() else "silent"
    if "No space left" not in first.stderr:
        return "unnamed"
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    again = subprocess.run(child, capture_output=True, timeout=PATIENCE, check=False)
    done = again.returncode == 0 and final(disk / "run") == reference_final()
    return "named" if done else "lost"


def kills(folder: Path, count: int, rng: np.random.Generator, how: signal.Signals) -> Tally:
    """A run that is ended at random moments until it has been ended `count` times; each time it
    starts again it goes on, and what it leaves is what an uninterrupted one does."""
    tally, number = Tally(), 0
    while sum(tally.values()) < count:
        number += 1
        run = folder / f"run{number}"
        child = [sys.executable, "-m", "benchmarks.faults", "--child", str(run), "--slowly"]
        while sum(tally.values()) < count:
            before = whole(run)
            process = subprocess.Popen(
                child, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            process.stdout.readline()  # It has begun.
            time.sleep(float(rng.uniform(0, 1.2)))
            ended = process.poll() is not None
            process.send_signal(how)
            try:
                process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                tally["hang"] += 1
                break
            if ended or process.returncode == 0:
                tally["fine" if final(run) == reference_final() else "silent"] += 1
                break
            expected = -how if how == signal.SIGKILL else 75
            if process.returncode != expected:
                tally["unnamed"] += 1
            else:
                tally["fine" if whole(run) >= before else "lost"] += 1
    return tally


def whole(run: Path) -> int:
    """The newest whole step, 0 for none."""
    found = [s for s in saved.steps(run) if not saved.problem(s, checkpoint.ITEMS)]
    return int(found[-1].name) if found else 0


def final(run: Path) -> bytes | None:
    """The numbers of a finished run."""
    if whole(run) != STEPS:
        return None
    reading = checkpoint.Checkpoints(run, every=1)
    try:
        restored = reading.restore(state_of(0), {})
    finally:
        reading.close()
    return None if restored is None else numbers(restored)


@functools.cache
def reference_final() -> bytes:
    state = state_of(0)
    for step in range(STEPS):
        state, _ = one_step(state, step_batch(step))
    return numbers(state)


def step_batch(step: int) -> dict[str, jax.Array]:
    return {"x": jnp.float32(step)}


@jax.jit
def one_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    w = jnp.cos(state.trainable["text/w"] + batch["x"])
    zero = jnp.zeros(())
    metrics = {"loss": w[0], "left_out": zero, "grad_norm": zero, "update_norm": zero}
    return TrainState(state.step + 1, {"text/w": w}, {}, {"mu": w * 0.5}), metrics


def child(workdir: Path, *, slowly: bool) -> None:
    """The real loop, checkpoints, lock, metrics and TensorBoard around a step of a few numbers."""
    from saber_jax.runs import distributed, lock
    from saber_jax.train import loop
    from saber_jax.train.metrics import MetricsWriter
    from saber_jax.train.nonfinite import NonFinite
    from saber_jax.train.profile import Profile
    from saber_jax.train.progress import Console

    class Batches:
        def __init__(self, first: int):
            self.step = first

        def __next__(self) -> dict[str, jax.Array]:
            time.sleep(0.1 if slowly else 0)
            self.step += 1
            return step_batch(self.step - 1)

        def state(self) -> dict:
            return {}

    class Meter:
        def count(self, batch: Any) -> dict:
            return {}

        def measure(self, counted: dict, seconds: float) -> dict[str, float]:
            return {}

    print("begun", flush=True)
    try:
        with distributed.ending_early(), lock.held(workdir):
            checkpoints = checkpoint.Checkpoints(workdir, every=1)
            state = checkpoints.restore(state_of(0), {}) or state_of(0)
            watch: Any = loop.Watch(
                writer=MetricsWriter(workdir, start=int(state.step)),
                console=Console(stage="sft", steps=STEPS, every=0),
                meter=Meter(),  # pyright: ignore[reportArgumentType]
                profile=Profile("", workdir, steps=STEPS),
                batches=Batches(int(state.step)),  # pyright: ignore[reportArgumentType]
                nonfinite=NonFinite(workdir=workdir, policy="stop", limit=0),
            )
            with distributed.Preemption():
                try:
                    loop.run(
                        state,
                        one_step,  # pyright: ignore[reportArgumentType]
                        steps=STEPS,
                        checkpoints=checkpoints,
                        meta={},
                        watch=watch,
                    )
                finally:
                    checkpoints.close()
                    watch.writer.close()
    except loop.Preempted:
        sys.exit(distributed.PREEMPTED)
    except (OSError, ValueError, checkpoint.SaveError) as error:
        sys.exit(f"{error}")


def overhead(folder: Path, megabytes: int) -> dict[str, float]:
    """Seconds that digests add to a save and a restore of a state of so many MB, as a share."""
    state = state_of(1, size=megabytes * 2**20 // 8)
    jax.block_until_ready(state.trainable)
    arrays = saved.named(state.params, "params") | saved.named(state.opt_state, "opt_state")
    saved.described(arrays)  # Compiles.
    began = time.perf_counter()
    saved.described(arrays)
    digests = time.perf_counter() - began
    writing = checkpoint.Checkpoints(folder, every=1)
    began = time.perf_counter()
    writing.save(state, {"step": 1})
    writing.close()
    save = time.perf_counter() - began
    reading = checkpoint.Checkpoints(folder, every=1)
    began = time.perf_counter()
    reading.restore(state, {})
    restore = time.perf_counter() - began
    reading.close()
    return {
        "save": digests / (save - digests),
        "restore": digests / (restore - digests),
        "GB_per_second": megabytes / 1024 / digests,
    }


def table(rows: dict[str, Tally]) -> str:
    columns = ("fine", "named", *FAILURES, "skipped")
    head = f"| {'fault':<28} | " + " | ".join(f"{c:>7}" for c in columns) + " |"
    lines = [head, f"|{'-' * 30}|" + "|".join("-" * 8 + ":" for _ in columns) + "|"]
    for name, tally in rows.items():
        lines.append(f"| {name:<28} | " + " | ".join(f"{tally[c]:>7}" for c in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few of each, within a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flips", type=int, help="bits in each kind of file; 100 by default")
    parser.add_argument("--kills", type=int, help="SIGKILLs; 100 by default")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--slowly", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        child(flags.child, slowly=flags.slowly)
        return
    rng = np.random.default_rng(flags.seed)
    flips = flags.flips or (8 if flags.quick else 100)
    killed = flags.kills or (2 if flags.quick else 100)
    few = 2 if flags.quick else 40
    rows: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{name}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

        def folder() -> Path:
            return Path(tempfile.mkdtemp(dir=name))

        # Each line is printed as soon as it is known: all of them take a while.
        work: dict[str, Callable[[], Tally]] = {
            "bit flips, checkpoints": lambda: checkpoint_flips(folder(), flips, rng),
            "bit flips, exports": lambda: export_flips(folder(), flips, rng),
            "bit flips, reference": lambda: reference_flips(folder(), flips, rng),
            "mutated inputs": lambda: mutated_inputs(folder(), 60 if flags.quick else 1000, rng),
            "absurd settings": lambda: absurd_configs(rng, flips),
            "full disks": lambda: full_disks(folder(), few, rng),
            "SIGTERM": lambda: kills(folder(), few, rng, signal.SIGTERM),
            "SIGKILL": lambda: kills(folder(), killed, rng, signal.SIGKILL),
        }
        for fault, run in work.items():
            began = time.perf_counter()
            rows[fault] = run()
            print(
                f"{fault}: {dict(rows[fault])} in {time.perf_counter() - began:.0f} s", flush=True
            )
        costs = overhead(folder(), 32 if flags.quick else 512)
    print(table(rows))
    failed = sum(tally[kind] for tally in rows.values() for kind in FAILURES)
    faults = sum(tally.total() - tally["skipped"] for tally in rows.values())
    result.finish(
        "faults",
        value=failed,
        unit="faults that were silent, unnamed, endless or lost something",
        goal=0,
        reached=failed == 0,
        correct=failed == 0,
        device=result.device(),
        quick=flags.quick,
        faults=faults,
        digest_overhead={name: round(value, 3) for name, value in costs.items()},
        outcomes={name: dict(tally) for name, tally in rows.items()},
    )


if __name__ == "__main__":
    main()
