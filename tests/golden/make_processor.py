"""Makes processor.npz: what the released preprocessing says about the clip of tests/golden/clip.py.

It needs packages that the project itself does without, in an environment of their own:

    pip install -r requirements.txt -r requirements-torch.txt
    pip install qwen-omni-utils==0.0.8 decord==0.6.0 librosa==0.11.0
    pip install --no-deps torchvision==0.28.0
    python -m tests.golden.make_processor

Frames are read and resized by qwen_omni_utils with decord, sound by librosa; the rest is
transformers' Qwen2_5OmniProcessor and get_rope_index. Pixels are stored as the bytes they were.
"""

# ruff: noqa: E402

import os
import tempfile
import types
from pathlib import Path

os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"

import numpy as np
import torch

# The torchvision of PyPI is built for CUDA. Beside a torch for CPUs its operators do not load, and
# importing it fails unless the two that it extends are at least declared.
_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import librosa
import soundfile
import transformers
from PIL import Image
from qwen_omni_utils.v2_5 import vision_process
from transformers import Qwen2_5OmniProcessor

from saber_jax.data import chat, decode, frame_sampling, sed
from saber_jax.hf.tokenizer import write_tokenizer
from saber_jax.models.vision import PIXEL_MEAN, PIXEL_STD
from tests import synthetic
from tests.data import test_tmrope
from tests.data.test_processor import CASES, PATCH_STEP
from tests.golden import clip

OUT = Path(__file__).with_name("processor.npz")


def processor(folder: Path) -> Qwen2_5OmniProcessor:
    opened = folder / "transformers"
    opened.mkdir()
    write_tokenizer(synthetic.tokenizer(folder), opened)
    return Qwen2_5OmniProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            min_pixels=frame_sampling.IMAGE_MIN_PIXELS, max_pixels=frame_sampling.IMAGE_MAX_PIXELS
        ),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        feature_extractor=transformers.WhisperFeatureExtractor(
            feature_size=128, chunk_length=300, return_attention_mask=True
        ),
        tokenizer=transformers.AutoTokenizer.from_pretrained(opened),
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        video, picture = clip.write(folder)
        ask = processor(folder)
        found = {case: of_clip(ask, video, sampling) for case, sampling in CASES.items()}
        found["picture"] = of_picture(ask, picture)
        for rate in (16_000, 44_100):
            text = sed.prompt_text("en", False, True)
            given = ask(text=[text], audio=[heard(video, rate)], return_tensors="pt")
            found[str(rate)] = {"mel": mel(given)}
    arrays = {f"{case}.{key}": v for case, facts in found.items() for key, v in facts.items()}
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT}: {OUT.stat().st_size / 1e3:.0f} kB, {sorted(arrays)}")


def of_clip(ask, path: Path, sampling: decode.FrameSampling) -> dict[str, np.ndarray]:
    wanted = {"video": str(path), "fps": sampling.fps}
    release = sampling.mode == "saber_release"
    if release:  # These two are constants of the module, which the published script replaces.
        vision_process.VIDEO_MAX_PIXELS = sampling.max_pixels
        vision_process.FPS_MAX_FRAMES = sampling.max_frames
    else:
        wanted |= {"min_pixels": sampling.min_pixels, "max_pixels": sampling.max_pixels}
        wanted |= {"max_frames": sampling.max_frames}
    frames, fps = vision_process.fetch_video(wanted, return_video_sample_fps=True)
    woven = {"load_audio_from_video": True, "audio_from_video_indices": [0]}
    given = ask(
        text=[sed.prompt_text("en", True, not sampling.audio_in_video)],
        videos=[frames],
        audio=[heard(path, 16_000)],
        videos_kwargs={"do_resize": False} | ({} if release else {"fps": fps}),
        **(woven if sampling.audio_in_video else {}),
        return_tensors="pt",
    )
    return facts(ask, given, "pixel_values_videos", sampling.audio_in_video)


def of_picture(ask, path: Path) -> dict[str, np.ndarray]:
    text = chat.render(sed.messages("en", [chat.Image(grid=(1, 2, 2))]))
    given = ask(text=[text], images=[Image.open(path)], return_tensors="pt")
    return facts(ask, given, "pixel_values", False)


def heard(path: Path, rate: int) -> np.ndarray:
    """The clip's sound as librosa loads it from a file of this sample rate."""
    wave = path.with_suffix(".wav")
    soundfile.write(wave, clip.sound(rate), rate, subtype="PCM_16")
    return librosa.load(wave, sr=16_000)[0]


def facts(ask, given, pixels: str, woven: bool) -> dict[str, np.ndarray]:
    ids = given["input_ids"][0].numpy()
    raw = given[pixels].numpy().reshape(-1, 3, 392)
    mean, std = (np.array(values)[None, :, None] * 255 for values in (PIXEL_MEAN, PIXEL_STD))
    return {
        "text": np.array(ask.tokenizer.decode(ids)),
        "positions": positions(ask, given, woven).astype(np.int16),
        "pixels": np.rint(raw * std + mean).astype(np.uint8).reshape(-1, 1176)[::PATCH_STEP],
        "normalised": given[pixels].numpy()[:2],
    }


def mel(given) -> np.ndarray:
    frames = int(given["feature_attention_mask"].sum())
    return given["input_features"][0, :, :frames].numpy().T


def positions(ask, given, woven: bool) -> np.ndarray:
    """get_rope_index of transformers on what its processor made."""
    ids = chat.media_ids(named(ask.tokenizer))
    listed = {key: value.tolist() for key, value in given.items() if key != "input_features"}
    row = types.SimpleNamespace(
        tokens=listed["input_ids"][0],
        grids=listed.get("video_grid_thw", []),
        images=listed.get("image_grid_thw", []),
        audios=[sum(mask) for mask in listed.get("feature_attention_mask", [])],
        seconds=listed.get("video_second_per_grid", []),
    )
    return test_tmrope.reference(ids)(row, woven=woven)


def named(tokenizer) -> types.SimpleNamespace:
    """The tokenizer of transformers under the name that ours gives to looking up a token."""
    return types.SimpleNamespace(id=tokenizer.convert_tokens_to_ids)


if __name__ == "__main__":
    main()
