import pytest

from saber_jax.data import reading

DAMAGE = (
    "",
    "Corrupted Riegeli/records file: chunk data hash mismatch (computed 0x1); at byte 9",
    "Invalid Riegeli/records file: chunk boundary is 9 but block header at 8 implies another",
    "ArrayRecord file should be at least 64KB big",
)
OUTAGES = (
    "pread() failed: Input/output error; reading a/shard; at byte 9; Could not read from it",
    "pread() failed: Invalid argument; reading a/shard; at byte 9",
    "open() failed: Too many open files; opening a/shard",
    "UNAVAILABLE: the bucket is busy",
)


@pytest.mark.parametrize("text", DAMAGE)
def test_damage_is_raised_at_once_and_as_it_is(text):
    attempts = []

    def read():
        attempts.append(text)
        raise RuntimeError(text)

    with pytest.raises(RuntimeError) as raised:
        reading.tried_again(read, forget=attempts.clear, what="a/shard")
    assert str(raised.value) == text and len(attempts) == 1


@pytest.mark.parametrize("error", [*map(RuntimeError, OUTAGES), OSError(5, "busy")])
def test_an_outage_drops_the_reader_before_every_attempt(error, monkeypatch):
    events = []
    monkeypatch.setattr(reading.time, "sleep", lambda seconds: events.append(seconds))

    def read():
        events.append("read")
        if len(events) < 6:
            raise error
        return "stored"

    assert reading.tried_again(read, forget=lambda: events.append("forget"), what="s") == "stored"
    assert events == ["read", "forget", 1, "read", "forget", 2, "read"]
