"""Reads of ArrayRecord files that are tried again when storage does not answer.

ArrayRecord raises RuntimeError both for damaged bytes and for a disk, network or bucket that fails,
and a reader that failed once repeats its error for ever:

    pread() failed: Input/output error; reading .../saber-train.array_record-00000-of-00001; ...
    Corrupted Riegeli/records file: chunk data hash mismatch (computed 0x..., stored 0x...), ...
"""

import errno
import re
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

ATTEMPTS = 3
"""Number of attempts to read before an error is raised."""

# Some damage has no text at all. The system's "Invalid argument" is none.
_DAMAGE = re.compile(r"\s*$|.*([Cc]orrupt|Invalid (?!argument)|should be at least)", re.DOTALL)


def is_outage(error: Exception) -> bool:
    """Whether storage failed, as opposed to what is stored."""
    if isinstance(error, RuntimeError):
        return _DAMAGE.match(str(error)) is None
    return isinstance(error, OSError)


def tried_again(read: Callable[[], T], *, forget: Callable[[], object], what: str) -> T:
    """`read()`, with more attempts if storage fails; `forget` drops open readers before each.

    Raises OSError, which names `what`, if the last attempt fails as well.
    """
    for attempt in range(ATTEMPTS):
        try:
            return read()
        except (OSError, RuntimeError) as error:
            if not is_outage(error):
                raise
            forget()
            if attempt + 1 == ATTEMPTS:
                raise OSError(
                    errno.EIO, f"storage failed {ATTEMPTS} times: {_brief(error)}", what
                ) from error
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def _brief(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300]
