"""Runs of stages that ask an endpoint and end early."""

import threading
from pathlib import Path

import pytest

pytest.importorskip("fsspec")

from data_prep.raw import answers, shards
from data_prep.raw.answers import EndpointSettings, RequestThreads
from data_prep.raw.shards import Row, ShardedStage
from tests.loopback import Answer, chat_server

SHARDS, ROWS = 3, 20  # In each shard.
AT_ONCE = 4


class Bug(Exception):
    """What no stage expects."""


class Run:
    """A run whose first AT_ONCE requests are under way together, until it is stopped."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch):
        self.out, self.busy = out, threading.Barrier(AT_ONCE + 1)
        self.pools: list[RequestThreads] = []
        monkeypatch.setattr(answers, "RequestThreads", self.threads)

    def threads(self, count: int) -> RequestThreads:
        self.pools.append(RequestThreads(count))
        return self.pools[-1]

    def serve(self, *_) -> Answer:
        self.busy.wait(60)
        assert self.pools[0].stopped.wait(60)
        return Answer(text='{"words": "one"}')

    def stage(self, name: str) -> ShardedStage:
        reasons = answers.REASONS
        return ShardedStage(
            name=name, out=str(self.out), shards=SHARDS, settings={}, reasons=reasons
        )

    def source(self) -> ShardedStage:
        source = self.stage("source")
        source.claim("")
        for shard in range(SHARDS):
            rows: list[Row] = [{"clip_id": f"{shard}-{i}"} for i in range(ROWS)]
            source.write(shard, rows, rows)
        return source

    def __call__(self, url: str, *, fails: bool) -> None:
        """With `fails`, the first clip of all raises Bug once the others ask."""

        def answer(row: Row) -> Row:
            if fails and first.acquire(blocking=False):
                self.busy.wait(60)
                raise Bug
            for question in ("first", "second"):
                message = {"role": "user", "content": f"{question} of {row['clip_id']}"}
                answers.ask_json(clients[0], [message], dict, language="en", settings={})
            return row

        def work(rows, endpoints, pool):
            clients.append(endpoints["judge"])
            return answers.each_row(rows, answer, pool)

        clients, first = [], threading.Lock()
        judge = EndpointSettings(url=url, model="m", concurrency=AT_ONCE + fails)
        answers.run_with(self.stage("asks"), self.source(), work, {"judge": judge})


def test_ctrl_c_lets_the_requests_under_way_finish_and_begins_no_other(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        run.busy.wait(60)
        raise KeyboardInterrupt

    run = Run(tmp_path, monkeypatch)
    monkeypatch.setattr(shards, "tqdm", interrupted)
    with chat_server(run.serve) as server, pytest.raises(KeyboardInterrupt):
        run(server.url, fails=False)
    assert len(server.requests) == AT_ONCE


def test_an_error_that_is_not_the_endpoints_ends_the_requests_of_all_shards(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    with chat_server(run.serve) as server, pytest.raises(Bug):
        run(server.url, fails=True)
    assert len(server.requests) == AT_ONCE
