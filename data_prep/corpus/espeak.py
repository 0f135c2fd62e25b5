"""espeak-ng in a small separate process: reads one JSON request per line, writes one utterance.

    echo '{"text": "Hello.", "voice": "en-us+f3", "rate": 150, "pitch": 50, "range": 50}' |
        python -m data_prep.corpus.espeak > utterance.raw

espeak-ng keeps hidden state between utterances, even if it is terminated and initialised again, so
a process that synthesises the same text twice gives two different sounds. Here every utterance is
made by a fork of a process that has only initialised the library, so it depends on its request
alone. The exceptions are the breathy voices (f2, f3, f5, Alicia, sandro, victor), whose noise is
seeded with the time of day.

The answer is a little-endian uint32 sample rate and a uint32 byte count, then int16 samples; a
count of 0 means that espeak-ng failed.

Only the standard library and espeakng-loader are imported, because a lean process forks fast.
"""

import ctypes
import gc
import json
import os
import struct
import sys

import espeakng_loader

HEADER = struct.Struct("<II")
# From espeak-ng/speak_lib.h.
_SYNCHRONOUS, _UTF8 = 2, 1
_PARAMETERS = {"rate": 1, "pitch": 3, "range": 4}
_ON_SAMPLES = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def utter(library: ctypes.CDLL, request: dict) -> bytes:
    """int16 samples of one request, b"" when its voice does not exist. Changes library state."""
    blocks = []

    def collect(samples, count, _events):
        if samples and count > 0:
            blocks.append(ctypes.string_at(samples, 2 * count))
        return 0

    on_samples = _ON_SAMPLES(collect)
    library.espeak_SetSynthCallback(on_samples)
    if library.espeak_SetVoiceByName(request["voice"].encode()):
        return b""
    for name, parameter in _PARAMETERS.items():
        library.espeak_SetParameter(parameter, int(request[name]), 0)
    text = request["text"].encode()
    library.espeak_Synth(text, len(text) + 1, 0, 1, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    return b"".join(blocks)


def _serve(library: ctypes.CDLL, sample_rate: int, line: bytes):
    """Answers one request from a fork; a fork that fails answers with no samples."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            pcm = utter(library, json.loads(line))
            sys.stdout.buffer.write(HEADER.pack(sample_rate, len(pcm)) + pcm)
            sys.stdout.buffer.flush()
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        sys.stdout.buffer.write(HEADER.pack(sample_rate, 0))
        sys.stdout.buffer.flush()


def main() -> int:
    """Serves standard input until it ends; returns 1 when the library cannot start."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = str(espeakng_loader.get_data_path())
    sample_rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), 0)
    if sample_rate <= 0:
        print(
            f"espeak-ng did not start from {data} (code {sample_rate}). "
            "Reinstall the espeakng-loader wheel.",
            file=sys.stderr,
        )
        return 1
    gc.freeze()  # A collection in a fork would copy the pages it touches.
    while line := sys.stdin.buffer.readline():
        _serve(library, sample_rate, line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
