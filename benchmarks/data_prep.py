"""Clips a second that one core prepares, stage by stage, and what 600,000 clips would need.

    python -m benchmarks.data_prep [--clips DIR] [--quick]

Without --clips, clips of the embedded corpus are drawn and enlarged to 480 x 360 at 25 fps, 4 s of
H.264 and AAC each, so that decoding costs what real clips cost. Times are CPU seconds, medians over
repetitions. The value is how many seconds of clips all stages together process in one second of a
core; 1 would be real time. The peer is plain decoding of the same clips with PyAV.

Annotation is bound by its endpoint, not by these cores. Its requests are built for real and sent to
a local server that answers at once, which measures what it costs a core.
"""

import argparse
import concurrent.futures
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType

from benchmarks.result import device, finish
from data_prep.corpus import build as corpus
from data_prep.corpus.plan import Sizes
from data_prep.raw import annotate, filters, measure, recogniser, transcripts
from data_prep.raw.answers import EndpointSettings
from data_prep.records import clips
from saber_jax.data import media

CLIPS = 600_000
SECONDS, FPS, SIZE = 4.0, 25, (480, 360)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=Path, help="a folder of videos to take instead")
    parser.add_argument("--quick", action="store_true", help="fewer clips, one repetition")
    parser.add_argument("--goal", type=float, default=2.0, help="least times faster than real time")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        count = 4 if flags.quick else 16
        if flags.clips:
            files = clips.find_videos(flags.clips)
            files = files[: 4 if flags.quick else None]
        else:
            files = list(_drawn(Path(folder), count))
        report(files, flags.goal, quick=flags.quick)


def report(files: list[Path], goal: float, *, quick: bool) -> None:
    """Prints a line per stage and the result."""
    repetitions = 1 if quick else 3
    recogniser.recognise(np.zeros(media.SAMPLE_RATE, np.int16), "en")  # Loads the models.
    measure.measure(files[0])
    stages = {
        "decode (peer)": _cpu(lambda: [_decode(f) for f in files], repetitions),
        "measure": _cpu(lambda: [measure.measure(f) for f in files], repetitions),
        "transcripts": _cpu(lambda: [_recognise(f) for f in files], repetitions),
        "annotate": _annotate(files, repetitions),
    }
    duplicates = _duplicates(20_000)
    per_clip = {name: value / len(files) for name, value in stages.items()}
    own = [name for name in stages if "peer" not in name]
    for name, value in per_clip.items():
        hours = value * CLIPS / 3600
        print(
            f"{name:14s} {value:7.4f} s a clip, {1 / value:8.1f} clips a second and core, "
            f"{hours:7.1f} core hours for {CLIPS:,} clips"
        )
    print(f"{'duplicates':14s} {duplicates * 1e6:7.1f} us a clip among 20,000")
    total = sum(per_clip[name] for name in own)
    played = statistics.fmean(measure.measure(f)["seconds"] for f in files)
    finish(
        "data_prep",
        value=round(played / total, 2),
        unit="seconds of clip per CPU second",
        goal=goal,
        reached=played / total >= goal,
        quick=quick,
        device=device(),
        clips=len(files),
        clip_seconds=round(played, 2),
        decoding_alone=round(played / per_clip["decode (peer)"], 1),
        seconds_per_clip={name: round(value, 4) for name, value in per_clip.items()},
        clips_per_second_and_core=round(1 / total, 2),
        core_hours_for_600k=round(total * CLIPS / 3600, 1),
        hours_on_64_cores=round(total * CLIPS / 3600 / 64, 2),
    )


def _cpu(work: Callable[[], object], repetitions: int) -> float:
    """Median CPU seconds of this process; threads of FFmpeg and onnxruntime count."""
    taken = []
    for _ in range(repetitions):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def _decode(file: Path) -> int:
    with av.open(str(file)) as container:
        streams = (container.streams.video[0], container.streams.audio[0])
        for stream in streams:
            stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(*streams))


def _recognise(file: Path) -> str:
    return recogniser.recognise(transcripts.sound(str(file)), "en")


def _annotate(files: list[Path], repetitions: int) -> float:
    """CPU seconds of building, sending and checking the requests; the server answers from a
    thread of this process, so its small cost is in."""
    with _server() as url, concurrent.futures.ThreadPoolExecutor(2) as pool:
        settings = annotate.AnnotateSettings(endpoint=EndpointSettings(url=url, model="none"))
        rows = [
            {
                "clip_id": file.stem,
                "file": str(file),
                "language": "en",
                "transcript": "",
                "provenance": [],
            }
            for file in files
        ]

        def work() -> None:
            with (
                tempfile.TemporaryDirectory() as cache
            ):  # A kept cache would answer the repetitions.
                clients = {"annotate": settings.endpoint.open(cache)}
                outcomes = annotate.work(rows, clients, pool, settings=settings)
                failed = [o for o in outcomes if not isinstance(o, dict)]
                if failed:
                    raise RuntimeError(f"{failed[0].reason}: {failed[0].detail}")

        return _cpu(work, repetitions)


@contextlib.contextmanager
def _server() -> Iterator[str]:
    text = "A person speaks."
    answer = {
        "audio_desc": {"speech_content": text, "acoustic_feat": text},
        "video_desc": text,
        "facial_exp_desc": text,
        "body_lang_desc": text,
        "sentiment_analysis": text,
    }
    message = {"role": "assistant", "content": json.dumps(answer)}
    body = json.dumps(
        {
            "model": "none",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1},
        }
    ).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def _duplicates(count: int) -> float:
    """Seconds per clip for looking up and adding `count` clips without duplicates."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, (count, 4), np.int64)
    known = filters.Duplicates(filters.FilterSettings())
    start = time.process_time()
    for index, row in enumerate(hashes.tolist()):
        fields = {"hashes": [f"{h:016x}" for h in row[:3]], "sound_hash": f"{row[3]:016x}"}
        if known.find(fields) is None:
            known.add(str(index), fields)
    return (time.process_time() - start) / count


def _drawn(folder: Path, count: int) -> Iterator[Path]:
    """Drawn clips, looped to SECONDS and enlarged, as H.264 and AAC."""
    sizes = Sizes(train=count - 3, preference=1, validation=1, test=1)
    with contextlib.redirect_stdout(sys.stderr):
        corpus.build(folder, sizes=sizes, workers=2)
    (folder / "large").mkdir()
    for file in sorted((folder / "clips").glob("*.mp4")):
        target = folder / "large" / file.name
        _enlarge(file, target)
        yield target


def _enlarge(file: Path, target: Path) -> None:
    with av.open(str(file)) as source:
        frames = [f.reformat(*SIZE, format="yuv420p") for f in source.decode(video=0)]
    sound = transcripts.sound(str(file))
    sound = np.resize(sound, int(SECONDS * media.SAMPLE_RATE))
    with av.open(str(target), "w") as out:
        video = out.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
        video.width, video.height, video.pix_fmt = *SIZE, "yuv420p"
        audio = out.add_stream("aac", rate=media.SAMPLE_RATE, layout="mono")
        for index in range(int(SECONDS * FPS)):
            frame = frames[index * 10 // FPS % len(frames)]
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            frame.pict_type = PictureType.NONE
            out.mux(video.encode(frame))
        out.mux(video.encode())
        for low in range(0, len(sound), 1024):
            part = sound[None, low : low + 1024].astype(np.float32) / 32768
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), "fltp", "mono")
            frame.sample_rate, frame.pts = media.SAMPLE_RATE, low
            out.mux(audio.encode(frame))
        out.mux(audio.encode())


if __name__ == "__main__":
    main()
