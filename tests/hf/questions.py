"""What a server and transformers are both asked. Runs in vLLM's environment, without our code.

    python questions.py transformers DIR      what transformers answers from the export DIR
    python questions.py URL MODEL             what the server at URL does

prints JSON: by question, how many tokens the prompt has and which the greedy answer has.
"""

import base64
import functools
import io
import json
import sys
import urllib.request
from typing import Any

import av
import numpy as np

WORDS, NEW_TOKENS, SECONDS, RATE = "A woman smiles, but her voice trembles.", 16, 2, 16_000
QUESTIONS = {
    "text": (),
    "video": ("video",),
    "video and sound": ("video", "audio"),
    "sound in the video": ("film",),
}


@functools.cache
def film() -> bytes:
    """Four frames and a falling tone, in an MP4."""
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        lossless = {"crf": "0", "preset": "ultrafast"}
        pictures = container.add_stream("libx264", rate=2, options=lossless)
        pictures.width, pictures.height, pictures.pix_fmt = 168, 112, "yuv420p"
        sound = container.add_stream("aac", rate=RATE, layout="mono")
        for _ in range(2 * SECONDS):
            grey = rng.integers(0, 256, (14, 21, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(pictures.encode())
        frame = av.AudioFrame.from_ndarray(_tone()[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return file.getvalue()


def _tone() -> np.ndarray:
    time = np.arange(SECONDS * RATE) / RATE
    return (0.3 * np.sin(2 * np.pi * (600 - 100 * time) * time)).astype(np.float32)


def wave() -> bytes:
    """The tone alone, 16 bits a sample."""
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        levels = np.round(_tone() * 32768).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(levels[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def ask_server(url: str, model: str) -> dict:
    def data(kind: str, content: bytes) -> dict:
        return {"url": f"data:{kind};base64,{base64.b64encode(content).decode()}"}

    parts = {
        "video": {"type": "video_url", "video_url": data("video/mp4", film())},
        "audio": {"type": "audio_url", "audio_url": data("audio/wav", wave())},
    }
    answers = {}
    for name, media in QUESTIONS.items():
        woven = media == ("film",)
        shown = [parts[kind] for kind in (("video",) if woven else media)]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": [*shown, {"type": "text", "text": WORDS}]}],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "return_token_ids": True,
        }
        if woven:
            body["mm_processor_kwargs"] = {"use_audio_in_video": True}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            said = json.load(response)
        answers[name] = [len(said["prompt_token_ids"]), said["choices"][0]["token_ids"]]
    return answers


def ask_transformers(directory: str) -> dict:
    import torch
    import transformers
    from vllm.multimodal.media import (  # pyright: ignore[reportMissingImports]
        AudioMediaIO,
        ImageMediaIO,
        VideoMediaIO,
    )

    torch.set_num_threads(1)
    processor = transformers.AutoProcessor.from_pretrained(directory)
    kind = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    model: Any = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    # How a server reads files is its own affair; what it makes of them is compared.
    frames, _ = VideoMediaIO(ImageMediaIO()).load_bytes(film())
    sounds = {"audio": wave(), "film": film()}
    answers = {}
    for name, media in QUESTIONS.items():
        woven = media == ("film",)
        parts = [{"type": "video" if part == "film" else part} for part in media]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [*parts, {"type": "text", "text": WORDS}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        given = {}
        if {"video", "film"} & set(media):
            given["videos"] = [frames]
        for part in sounds.keys() & set(media):
            samples, rate = AudioMediaIO().load_bytes(sounds[part])
            assert rate == RATE
            given["audio"] = [samples]
        inputs = processor(text=prompt, return_tensors="pt", use_audio_in_video=woven, **given)
        with torch.no_grad():
            out = model.generate(
                **inputs, use_audio_in_video=woven, do_sample=False, max_new_tokens=NEW_TOKENS
            )
        length = inputs["input_ids"].shape[1]
        answers[name] = [length, out[0, length:].tolist()]
    return answers


if __name__ == "__main__":
    first, second = sys.argv[1:]
    asked = ask_transformers(second) if first == "transformers" else ask_server(first, second)
    print(json.dumps(asked))
