"""What a test's process asks of the network."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def asked_hosts() -> Iterator[list[str]]:
    """Hosts that this process looks up or connects to meanwhile."""
    hosts, listening = [], True

    def hook(event, args):
        if listening and event == "socket.getaddrinfo":
            hosts.append(args[0])
        if listening and event == "socket.connect" and isinstance(args[1], tuple):
            hosts.append(args[1][0])

    sys.addaudithook(hook)
    yield hosts
    listening = False  # Python has no way to remove a hook.
