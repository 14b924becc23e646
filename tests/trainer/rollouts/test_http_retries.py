"""When a request is tried again, and when no more: on a clock of the tests' own."""

import pytest

from rlhf_trainer.rollouts import http_json
from rlhf_trainer.rollouts.http_json import LostConnection, RequestError, Server, request_any


class Clock:
    """Stands still but for sleep."""

    def __init__(self):
        self.now, self.delays = 0.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.delays.append(seconds)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(http_json, "time", clock)
    monkeypatch.setattr(http_json, "JITTER", 0.0)
    return clock


def answering(monkeypatch, answers, **options):
    """A server whose tries end as `answers` say: exceptions are raised; the last one is for all that follow."""
    server, left = Server("http://127.0.0.1:9", **options), list(answers)

    def exchange(path, body, is_json):
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(server, "_exchange", exchange)
    return server


def test_a_server_that_is_down_is_waited_for_as_long_as_wished(clock, monkeypatch):
    server = answering(monkeypatch, [LostConnection("refused")], retries=2, patience_s=100.0)
    with pytest.raises(LostConnection, match=r"refused \(at the last of 8 tries\)"):
        server.request("/", {}, dict)
    assert clock.delays == [1, 2, 4, 8, 16, 32, 37] and clock.now == 100.0
    assert server.lost_connections == server.failures == 8


def test_one_that_comes_back_answers(clock, monkeypatch):
    down = [LostConnection("refused")] * 6
    server = answering(monkeypatch, [*down, {"up": True}], retries=0, patience_s=100.0)
    assert server.request("/", {}, dict) == {"up": True}
    assert (server.requests, server.failures, server.failures_in_a_row) == (7, 6, 0)


def test_answers_that_are_errors_are_not_waited_for(clock, monkeypatch):
    server = answering(monkeypatch, [RequestError("HTTP 500", status=500)], retries=2, patience_s=100.0)
    with pytest.raises(RequestError, match="at the last of 3 tries"):
        server.request("/", {}, dict)
    assert clock.delays == [1, 2] and server.lost_connections == 0


def test_a_wish_counts_while_a_server_is_waited_for(clock, monkeypatch):
    busy = RequestError("HTTP 503", status=503, delay_s=50.0)
    server = answering(monkeypatch, [busy, LostConnection("refused"), {}], retries=1, patience_s=60.0)
    assert server.request("/", {}, dict) == {}
    assert clock.delays == [50.0, 2.0]


def test_delays_are_spread_so_that_those_who_failed_together_come_apart(clock, monkeypatch):
    monkeypatch.setattr(http_json, "JITTER", 0.25)
    for _ in range(20):
        server = answering(monkeypatch, [LostConnection("refused"), {}])
        server.request("/", {}, dict)
    assert all(1.0 <= delay <= 1.25 for delay in clock.delays) and len(set(clock.delays)) == 20


def test_the_server_with_the_least_to_do_is_next(clock, monkeypatch):
    one, two, three = (answering(monkeypatch, [{}]) for _ in range(3))
    one.under_way, two.failures_in_a_row, three.requests = 1, 2, 5
    order = [request_any([one, two, three], "/", {}, lambda answer, server: server) for _ in range(2)]
    assert order == [three, three]
    three.under_way = 4
    assert request_any([one, two, three], "/", {}, lambda answer, server: server) is one
    one.under_way = 4
    assert request_any([one, two, three], "/", {}, lambda answer, server: server) is two and not two.failures_in_a_row
