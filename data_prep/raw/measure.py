"""Stage `measure`: measures picture, sound, speech and faces of a clip.

Picture quality and loudness come from FFmpeg filters (blurdetect, blackdetect, freezedetect,
ebur128), speech from silero-vad (in the faster-whisper wheel), faces from OpenCV's cascade, and
similarity from 64-bit perceptual hashes. The thresholds are in data_prep.raw.filters, so that they
can be changed without measuring again. Clips are measured in a process of its own
(saber_jax.data.isolation), so that a file that crashes a decoder is dropped alone.

    measures     seconds, width, height, fps, kilobits_per_second
                 loudness      integrated, LUFS; -70 is silence
                 speech        seconds in which somebody speaks
                 blur          width of edges as FFmpeg estimates it, in pixels at 320 px, median
                               over the pictures; 100 without edges
                 black, frozen share of the time, 0 to 1
                 faces         share of the sampled pictures that show a face
                 face_track    longest unbroken run of one face, as a share of these pictures
                 face_height   median height of the largest face, as share of the picture
                 hashes        perceptual hashes (hex) of the pictures at 1/6, 3/6 and 5/6
                 sound_hash    the same of the log-mel spectrogram
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import imagehash
import numpy as np
from av.filter import Graph
from cv2.data import haarcascades
from jaxtyping import Float, Int16, UInt8
from PIL import Image

from data_prep.raw import storage
from data_prep.raw.shards import Dropped, Outcome, Row
from saber_jax.data import isolation, media
from saber_jax.data.frame_sampling import MediaError
from saber_jax.data.timeline import opened, playable

SAMPLE_RATE = media.SAMPLE_RATE
WIDTH = 320
"""All pictures are measured at this width, so thresholds mean the same for every resolution."""
SILENCE = -70.0
NO_EDGES = 100.0  # FFmpeg gives no number for a picture without edges.

REASONS = {
    "unreadable": "the file cannot be decoded",
    "no_video": "the file has no picture",
    "no_audio": "the file has no sound",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """Resolution of the measures. `looks_per_second`: pictures that are searched for faces."""

    looks_per_second: float = 2.0
    smallest_face: float = 0.12  # Height, as share of the picture.
    frozen_seconds: float = 0.5  # Shorter standstills are not counted.


def work(rows: list[Row], settings: MeasureSettings) -> Iterator[Outcome]:
    """The stage: each row with its measures, or dropped as undecodable."""
    for row in rows:
        try:
            with storage.local_copy(row["file"]) as path:
                measures = isolation.call(measure, path, settings)
        except MediaError as error:
            yield Dropped(row=row, reason=error.reason, detail=error.detail)
            continue
        yield {**row, "measures": measures, "provenance": [*row["provenance"], _made(settings)]}


def measure(path: Path, settings: MeasureSettings = MeasureSettings()) -> dict[str, Any]:
    """The measures of one file, see the module docstring.

    Raises MediaError with a reason of REASONS, also for a file that does not exist.
    """
    try:
        with opened(path) as container:
            for kind in ("video", "audio"):
                if not playable(getattr(container.streams, kind)):
                    raise MediaError(f"no_{kind}", path.name)
            pass_ = _Pass(container, settings)
            pass_.decode()
    except (MediaError, OSError) as error:
        if isinstance(error, MediaError) and error.reason in REASONS:
            raise
        raise MediaError("unreadable", str(error)) from error
    if not pass_.count:
        raise MediaError("unreadable", f"{path.name}: no frame decodes")
    return pass_.measures(path.stat().st_size)


class _Pass:
    """One decoding of a file, feeding FFmpeg's filters and keeping a few small pictures."""

    def __init__(self, container, settings: MeasureSettings):
        self._settings = settings
        self._container = container
        video = playable(container.streams.video)[0]
        audio = playable(container.streams.audio)[0]
        self._video, self._audio = video, audio
        self.count = 0
        self._first = self._last = 0.0
        self._blur: list[float] = []
        self._intervals = {"black": _Intervals(), "freezedetect.freeze": _Intervals()}
        self._pictures: list[tuple[float, UInt8[np.ndarray, "H W"]]] = []
        self._loudness = SILENCE
        self._sound: list[np.ndarray] = []
        frozen = f"n=0.001:d={settings.frozen_seconds}"
        self._picture_filters = filters(
            lambda graph: graph.add_buffer(template=video, time_base=video.time_base),
            [
                ("scale", f"{WIDTH}:-2"),
                ("format", "gray"),
                ("blackdetect", "d=0.1"),
                ("freezedetect", frozen),
                ("blurdetect", ""),
                ("buffersink", ""),
            ],
        )
        self._sound_filters = filters(
            lambda graph: graph.add_abuffer(template=audio),
            [("ebur128", "metadata=1"), ("abuffersink", "")],
        )

    def decode(self) -> None:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        for frame in self._container.decode(self._video, self._audio):
            if isinstance(frame, av.VideoFrame):
                self._picture_filters.push(frame)
                self._take_pictures()
            elif isinstance(frame, av.AudioFrame):
                self._sound_filters.push(frame)
                self._take_loudness()
                self._sound += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        if self.count:
            self._picture_filters.push(None)
            self._take_pictures()
        if self._sound:
            self._sound_filters.push(None)
            self._take_loudness()
            self._sound += [part.to_ndarray()[0] for part in resampler.resample(None)]

    def _take_pictures(self) -> None:
        for frame in pulled(self._picture_filters):
            time = frame.time or 0.0
            if not self.count:
                self._first = time
            self.count, self._last = self.count + 1, max(self._last, time)
            if "lavfi.blur" in frame.metadata:
                blur = float(frame.metadata["lavfi.blur"])
                self._blur.append(NO_EDGES if math.isnan(blur) else blur)
            for name, intervals in self._intervals.items():
                intervals.read(frame.metadata, name)
            looked = len(self._pictures) / self._settings.looks_per_second
            if time - self._first >= looked:
                self._pictures.append((time, frame.to_ndarray(format="gray")))

    def _take_loudness(self) -> None:
        for frame in pulled(self._sound_filters):
            if "lavfi.r128.I" in frame.metadata:
                self._loudness = float(frame.metadata["lavfi.r128.I"])

    def measures(self, size: int) -> dict[str, Any]:
        rate = self._video.average_rate or Fraction(25)
        seconds = max(self._last - self._first + float(1 / rate), 1e-3)
        sound = np.concatenate(self._sound) if self._sound else np.zeros(0, np.int16)
        spoken = speech(sound.astype(np.float32) / 32768)
        pictures = [picture for _, picture in self._pictures]
        boxes = [faces(picture, self._settings.smallest_face) for picture in pictures]
        heights = [max(box[3] for box in found) for found in boxes if found]
        middle = [pictures[int(len(pictures) * part)] for part in (1 / 6, 3 / 6, 5 / 6)]
        black, frozen = (i.share(self._last, seconds) for i in self._intervals.values())
        return {
            "seconds": round(seconds, 3),
            "width": self._video.width,
            "height": self._video.height,
            "fps": round(float(rate), 3),
            "kilobits_per_second": round(size * 8 / seconds / 1000, 1),
            "loudness": round(max(self._loudness, SILENCE), 2),
            "speech": round(sum(end - start for start, end in spoken), 3),
            "blur": round(statistics.median(self._blur or [NO_EDGES]), 3),
            "black": round(black, 4),
            "frozen": round(frozen, 4),
            "faces": round(len(heights) / len(boxes), 4),
            "face_track": round(longest_track(boxes) / len(boxes), 4),
            "face_height": round(
                statistics.median(heights) / pictures[0].shape[0] if heights else 0.0, 4
            ),
            "hashes": [str(imagehash.phash(Image.fromarray(picture))) for picture in middle],
            "sound_hash": _sound_hash(sound),
        }


class _Intervals:
    """Intervals that a filter reports as NAME_start and NAME_end."""

    def __init__(self):
        self._total, self._since = 0.0, None

    def read(self, metadata: dict[str, str], name: str) -> None:
        if f"lavfi.{name}_start" in metadata:
            self._since = float(metadata[f"lavfi.{name}_start"])
        if f"lavfi.{name}_end" in metadata and self._since is not None:
            self._total += float(metadata[f"lavfi.{name}_end"]) - self._since
            self._since = None

    def share(self, end: float, seconds: float) -> float:
        open_ = 0.0 if self._since is None else end - self._since
        return min(1.0, (self._total + open_) / seconds)


def _sound_hash(sound: Int16[np.ndarray, " n"]) -> str:
    mel = media.log_mel(sound)
    if len(mel) < 2:
        return "0" * 16
    picture = (255 * np.clip(mel.T / 2 + 0.5, 0, 1)).astype(np.uint8)
    return str(imagehash.phash(Image.fromarray(picture)))


def filters(source, chain: list[tuple[str, str]]) -> Graph:
    graph = Graph()
    nodes = [source(graph), *(graph.add(*[part for part in node if part]) for node in chain)]
    for before, after in itertools.pairwise(nodes):
        before.link_to(after)
    graph.configure()
    return graph


def pulled(graph: Graph) -> Iterator[Any]:
    while True:
        try:
            yield graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return


def speech(sound: Float[np.ndarray, " n"]) -> list[tuple[float, float]]:
    """(start, end) in seconds of every interval of speech in 16 kHz mono sound within [-1, 1]."""
    from faster_whisper import vad  # Takes a second, and only workers need it.

    if len(sound) < 512:  # One window of the detector.
        return []
    options = vad.VadOptions(min_silence_duration_ms=300, speech_pad_ms=50)
    stretches = vad.get_speech_timestamps(sound, options, sampling_rate=SAMPLE_RATE)
    return [(s["start"] / SAMPLE_RATE, s["end"] / SAMPLE_RATE) for s in stretches]


Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""


@functools.cache
def _cascade() -> cv2.CascadeClassifier:
    cv2.setNumThreads(1)
    return cv2.CascadeClassifier(haarcascades + "haarcascade_frontalface_alt2.xml")


def faces(picture: UInt8[np.ndarray, "H W"], smallest: float) -> list[Box]:
    """Frontal faces of a grey picture, at least `smallest` of its height tall."""
    side = max(20, round(smallest * picture.shape[0]))
    found = _cascade().detectMultiScale(picture, 1.1, 4, minSize=(side, side))
    return [(int(x), int(y), int(width), int(height)) for x, y, width, height in found]


def longest_track(looks: Iterable[list[Box]]) -> int:
    """The longest run of pictures with the same face: boxes that overlap by a third match."""
    best = 0
    runs: list[tuple[Box, int]] = []
    for boxes in looks:
        runs = [
            (box, 1 + max((n for before, n in runs if _overlap(before, box) > 1 / 3), default=0))
            for box in boxes
        ]
        best = max([best, *(n for _, n in runs)])
    return best


def _overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def _made(settings: MeasureSettings) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in _TOOLS}
    return {
        "fields": ["measures"],
        "tool": "data_prep.measure",
        "model": "silero-vad v6, haarcascade_frontalface_alt2",
        "prompt": None,
        "parameters": {**dataclasses.asdict(settings), "versions": versions},
    }


_TOOLS = ("av", "faster-whisper", "opencv-python-headless", "ImageHash")
