"""CPU-seconds a clip from storage to batch: ours, and Qwen2_5OmniProcessor in a torch DataLoader.

    launch/setup.sh --bench
    python -m benchmarks.input_pipeline [--quick]

Both start from the same clips, sampled as the published SABER script does (110 to 120 tokens a
frame pair), and end with a batch in memory:

- ours: ArrayRecord -> tokens, positions, uint8 patches, log-mel -> packed rows;
- processor, decoded: frames and sound that lie in memory -> the processor's tensors;
- processor, files: the same, but decoding and resizing each video file first (by our decoder, which
  gives the released preprocessing's pixels), as trainers do that keep no records.

Both work in as many processes as there are cores, at most two. Their CPU time and that of the
process that takes the batches are added. The cost of a clip is that of one more pass over the
clips, so that starting the processes does not count. The sound is also processed alone, by one
process, to show its share, and the bytes sent to a device are counted. Last comes the memory of the
loader: the bound of three recipes, and how much of its bound a small run with a slow training loop
used.

The processor needs torchvision, which nothing else here does. Without it only our figures are
printed, the value is null and the exit code 1. The last line reports the ratio to `processor,
decoded`, the smaller of the two, and what share of a v5e-256's step 224 host cores would be busy: a
step of 7B at 40% of 197 TFLOP/s on each chip, 8 FLOPs a parameter and token.
"""

import argparse
import functools
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np

from benchmarks import lengths, loader_memory, result
from data_prep.records import dataset
from saber_jax.data import decode, encoded, loader, media, planning, sed
from saber_jax.data.packing import Budget
from saber_jax.data.records import FIELDS, Record, RecordSource
from saber_jax.data.sources import Sources
from saber_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

GOAL = 5.0
WORKERS = min(2, len(os.sched_getaffinity(0)))
PASSES = 8  # Passes over the clips after the first.
WORDS = 45  # Of each section: an answer of about 500 tokens.
HOST_CORES, CHIPS, PEAK, MFU = 224, 256, 197e12, 0.4
PARAMETERS, STEP_FLOPS = 7.07e9, 8  # Forward, backward and a second forward.
BUDGET = Budget(length=4096, patches=9600, chunks=15, targets=2816, segments=6)

PROCESSOR = "Qwen2_5OmniProcessor's tensors, torch DataLoader"
ROWS = {
    "record to packed row, ours": ("ours", "ours, sound alone"),
    f"frames in memory to {PROCESSOR}": ("processor, decoded", "processor, sound alone"),
    "the same from video files": ("processor, files", "processor, sound alone"),
}
"""Lines of the table: what is measured, and the line of which its sound is a part."""


def write_video(path: Path, seconds: float, rng: np.random.Generator) -> None:
    """640 x 360 at 25 frames a second: drifting smooth colours with some grain, and noise."""
    small = rng.uniform(0, 255, (12, 20, 3))
    base = np.kron(small, np.ones((34, 36, 1)))
    grain = rng.normal(0, 4, (3, 360, 640, 1))
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt, video.bit_rate = 640, 360, "yuv420p", 2_000_000
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        for number in range(round(25 * seconds)):
            y, x = number % 48, (2 * number) % 80
            picture = base[y : y + 360, x : x + 640] + grain[number % 3]
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), "rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        samples = rng.normal(0, 0.1, round(16_000 * seconds)).astype(np.float32)
        for start in range(0, len(samples), 1024):
            piece = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], "fltp", "mono")
            piece.sample_rate, piece.pts, piece.time_base = 16_000, start, Fraction(1, 16_000)
            container.mux(sound.encode(piece))
        container.mux(sound.encode())


def vocabulary(folder: Path, texts: list[str]) -> Tokenizer:
    texts = texts + [sed.prompt_text(language, True, True) for language in ("en", "zh")]
    headings = [sed.heading(field) for field in FIELDS]
    path = folder / "tokenizer.model"
    train_sentencepiece(texts, path, vocab_size=768, symbols=headings)
    return load_tokenizer(path)


def record(path: Path, rng: np.random.Generator) -> Record:
    clip = decode.decode_clip(path, lengths.RELEASE)
    words = ("calm", "person", "speaks", "loudly", "in", "the", "quiet", "red", "room", "slowly")
    annotation = {field: " ".join(rng.choice(words, WORDS)) for field in FIELDS}
    return Record(
        clip_id=path.stem,
        language="en",
        frames=clip.frames,
        seconds_per_grid=clip.seconds_per_grid,
        audio=clip.audio,
        annotation=annotation,
        labels={},
        provenance={},
    )


Work = Callable[[int], None]
"""Passes over all clips this many times, in processes of its own."""


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process and of its children that have ended."""

    def spent() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        used = [resource.getrusage(kind) for kind in kinds]
        return sum(u.ru_utime + u.ru_stime for u in used)

    before = spent()
    work()
    return spent() - before


def a_pass(work: Work, passes: int) -> float:
    """CPU seconds of one more pass."""
    once, often = (cpu_seconds(lambda n=n: work(n)) for n in (1, 1 + passes))
    return (often - once) / passes


def planned(examples: encoded.Examples) -> tuple[encoded.Examples, list[list[int]]]:
    """The examples, and rows that hold each of them once."""
    sizes = np.array([list(vars(examples.measure(i)[0][0]).values()) for i in range(len(examples))])
    return examples, planning.plan_rows(sizes, np.arange(len(sizes)), BUDGET)


def ours(examples: encoded.Examples) -> Work:
    _, rows = planned(examples)

    def work(passes: int) -> None:
        batches = loader.HostRows([row for _ in range(passes) for row in rows], 1)
        stream = loader.stream(batches, examples, BUDGET, threads=1, workers=WORKERS)
        assert sum(int(b.pairs.valid.sum()) for b, _ in stream) == passes * len(examples)

    return work


def processor_of(folder: Path, tokenizer: Tokenizer) -> Any:
    """Qwen2_5OmniProcessor with the released settings; ImportError without torchvision."""
    import torch

    # launch/setup.sh --bench installs torchvision here, where nothing else finds it.
    sys.path.append(str(Path(sys.prefix) / "bench"))
    if not hasattr(torch.ops, "torchvision") or not hasattr(torch.ops.torchvision, "nms"):
        # The torchvision of PyPI is built for CUDA: beside a torch for CPUs its operators do not
        # load, and importing it fails unless the two that it extends are at least declared.
        global _library
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
    import transformers

    from saber_jax.hf.tokenizer import write_tokenizer

    opened = folder / "transformers"
    opened.mkdir()
    write_tokenizer(tokenizer, opened)
    return transformers.Qwen2_5OmniProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        # Frames come resized; unset, every worker warns that the default is about to change.
        video_processor=transformers.Qwen2VLVideoProcessor(cap_pixels_per_frame=True),
        feature_extractor=transformers.WhisperFeatureExtractor(
            feature_size=128, chunk_length=300, return_attention_mask=True
        ),
        tokenizer=transformers.AutoTokenizer.from_pretrained(opened),
    )


def theirs(processor, records: list[Record], files: list[Path] | None) -> Work:
    """A DataLoader that collates two clips at a time with the processor."""
    import torch

    torch.set_num_threads(1)  # Its workers have one thread each anyway.

    def one(index: int):
        if files is None:
            return records[index].frames, records[index].audio
        clip = decode.decode_clip(files[index], lengths.RELEASE)
        return clip.frames, clip.audio

    def collate(indices: list[int]):
        clips = [one(index) for index in indices]
        texts = [
            sed.prompt_text("en", True, True) + sed.target_text(records[i].annotation)
            for i in indices
        ]
        return processor(
            text=texts,
            videos=[torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()) for frames, _ in clips],
            audio=[audio.astype(np.float32) / 32768 for _, audio in clips],
            videos_kwargs={"do_resize": False},
            padding=True,
            return_tensors="pt",
        )

    def work(passes: int) -> None:
        loading = torch.utils.data.DataLoader(
            cast(Any, list(range(len(records))) * passes),
            batch_size=2,
            collate_fn=collate,
            num_workers=WORKERS,
        )
        assert sum(len(batch["input_ids"]) for batch in loading) == passes * len(records)

    return work


def mels(processor, records: list[Record]) -> None:
    """The log-mel of the processor, which pads every sound to 300 s."""
    for one in records:
        wave = one.audio.astype(np.float32) / 32768
        processor.feature_extractor(wave, sampling_rate=media.SAMPLE_RATE, padding="max_length")


def bytes_a_clip(records: list[Record]) -> dict[str, int]:
    """Bytes per clip that our rows send to the device, and bytes of the sound as it is stored."""
    layouts = [one.frames.shape[:3] for one in records]
    patches = sum(
        t // media.TEMPORAL_PATCH * (h // media.PATCH) * (w // media.PATCH) for t, h, w in layouts
    )
    chunks = sum(-(-media.mel_frames(len(one.audio)) // media.CHUNK_FRAMES) for one in records)
    totals = {
        "patches": patches * media.PATCH_FEATURES,
        "mel": chunks * media.CHUNK_FRAMES * media.MELS * np.dtype(np.float32).itemsize,
        "samples": chunks * media.CHUNK_FRAMES * media.HOP * np.dtype(np.int16).itemsize,
    }
    return {name: round(total / len(records)) for name, total in totals.items()}


def step_share(seconds_a_clip: float, rng: np.random.Generator) -> float:
    """The share of a step's time in which 224 cores prepare its batch."""
    sizes = lengths.supervised(2048, lengths.RELEASE, rng)
    usable = np.flatnonzero(planning.fits(sizes, BUDGET))
    clips_a_row = len(usable) / len(planning.plan_rows(sizes, usable, BUDGET))
    step = STEP_FLOPS * PARAMETERS * BUDGET.length / (CHIPS * PEAK * MFU)
    return seconds_a_clip * clips_a_row / HOST_CORES / step


def table(times: Mapping[str, float]) -> list[str]:
    """CPU milliseconds a clip, as docs/data.md shows them."""
    lines = ["| | all | of which sound |", "|---|---|---|"]
    for name, (label, sound) in ROWS.items():
        if label in times:
            lines.append(f"| {name} | {times[label] * 1e3:.3g} | {times[sound] * 1e3:.3g} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer clips, once")
    quick = parser.parse_args().quick
    count, repeats = (4, 1) if quick else (24, 3)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.perf_counter()
        files = [folder / f"clip{i}.mp4" for i in range(count)]
        for file, seconds in zip(files, lengths.seconds(count, rng), strict=True):
            write_video(file, float(seconds), rng)
        records = [record(file, rng) for file in files]
        tokenizer = vocabulary(folder, [sed.target_text(r.annotation) for r in records])
        dataset.write(folder, {"train": records}, lambda item: item)
        print(f"{count} clips made in {time.perf_counter() - began:.0f} s")
        source = RecordSource(folder, "train")
        examples = encoded.Examples(Sources([source], [1.0]), tokenizer)
        work = {"ours": ours(examples)}
        alone: dict[str, Callable[[], object]] = {}
        alone["ours, sound alone"] = lambda: [media.log_mel(r.audio) for r in records]
        try:
            processor = processor_of(folder, tokenizer)
            work["processor, decoded"] = theirs(processor, records, None)
            work["processor, files"] = theirs(processor, records, files)
            alone["processor, sound alone"] = functools.partial(mels, processor, records)
        except ImportError as error:
            print(f"No processor to compare with ({error}). Run launch/setup.sh --bench.")
        times: dict[str, float] = {}
        for label, run in work.items():
            passes = PASSES if label == "ours" else 1  # The others take ten times as long.
            measured = [a_pass(run, passes) for _ in range(repeats)]
            times[label] = float(np.median(measured)) / count
        for label, make in alone.items():
            make()  # The mel filters are computed once per process.
            times[label] = float(np.median([cpu_seconds(make) for _ in range(repeats)])) / count
        print("\n".join(table(times)))
        travels = bytes_a_clip(records)
        held, allowed = loader_memory.measured(*planned(examples), BUDGET, workers=WORKERS)
    share = step_share(times["ours"], rng)
    theirs_seconds = times.get("processor, decoded")
    ratio = theirs_seconds and round(theirs_seconds / times["ours"], 2)
    print("to the device, KB a clip:", {k: round(v / 1e3, 1) for k, v in travels.items()})
    print(f"224 cores are busy for {share:.2%} of a v5e-256's step")
    print("\n".join(loader_memory.table()))
    print(f"measured with {WORKERS} processes: {held:.1f} rows held, at most {allowed} allowed")
    result.finish(
        "input_pipeline",
        value=ratio,
        unit="CPU-seconds a clip, processor on decoded frames / ours",
        goal=GOAL,
        reached=ratio is not None and ratio >= GOAL,
        correct=ratio is not None,
        quick=quick,
        device=result.device(),
        cpu_ms_per_clip={label: round(seconds * 1e3, 2) for label, seconds in times.items()},
        bytes_per_clip=travels,
        v5e_256_step_share=round(share, 5),
        loader_gb_a_host={
            name: round(loader_memory.bound(name).bytes / 1e9, 1) for name in loader_memory.RECIPES
        },
        loader_rows_held=round(held, 1),
        loader_rows_allowed=allowed,
        workers=WORKERS,
    )


if __name__ == "__main__":
    main()
