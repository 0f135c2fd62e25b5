"""A chat endpoint on loopback that answers, or misbehaves, as a test says."""

import contextlib
import dataclasses
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """`text` as a chat completion; or `body` as it is. `cut` breaks the connection midway, and
    `drip` is the pause before each byte of the body."""

    text: str = ""
    body: str | None = None
    status: int = 200
    delay: float = 0.0
    cut: bool = False
    drip: float = 0.0
    finish_reason: str = "stop"
    headers: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass
class ChatServer:
    """`requests` are the bodies that came in; `keys` what each Authorization header said."""

    url: str
    requests: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    keys: list[str] = dataclasses.field(default_factory=list)
    most_at_once: int = 0


@contextlib.contextmanager
def chat_server(script: Callable[[dict[str, Any], int], Answer]) -> Iterator[ChatServer]:
    """`script(request, number)` makes the answer to request `number`, counted from 0."""
    lock = threading.Lock()
    running = 0

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            nonlocal running
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(state.requests)
                state.requests.append(request)
                state.keys.append(self.headers.get("Authorization", ""))
                running += 1
                state.most_at_once = max(state.most_at_once, running)
            try:
                answer = script(request, number)
                time.sleep(answer.delay)
                self.reply(answer, request)
            finally:
                with lock:
                    running -= 1

        def reply(self, answer: Answer, request: dict[str, Any]) -> None:
            body = (
                answer.body if answer.body is not None else completion(answer, request)
            ).encode()
            self.send_response(answer.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in answer.headers:
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # The client may have given up.
                body = body[: len(body) // 2] if answer.cut else body
                size = 1 if answer.drip else max(1, len(body))
                for i in range(0, len(body), size):
                    time.sleep(answer.drip)
                    self.wfile.write(body[i : i + size])
            self.close_connection = answer.cut

        def log_message(self, format, *args):
            del format, args

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = ChatServer(url=f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(answer: Answer, request: dict[str, Any]) -> str:
    """The JSON of a chat completion; a token is four characters here."""
    prompt = sum(len(str(message["content"])) for message in request["messages"]) // 4
    return json.dumps(
        {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": answer.text},
                    "finish_reason": answer.finish_reason,
                }
            ],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": len(answer.text) // 4,
                "total_tokens": prompt + len(answer.text) // 4,
            },
        }
    )
