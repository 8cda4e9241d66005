"""The driver in virtual time: what it sends, when, and what it makes of the answers."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.core import Model
from loadtest.driver import PAUSE, Driver
from loadtest.recorder import Columns
from loadtest.run import due_times, make_plan
from loadtest.workload import Workload
from tests.loadtest.virtual import VirtualClock, VirtualTransport, a_run


class Played:
    """A run against arithmetic, from start to end."""

    def __init__(self, until: float = float("inf"), fail: Any = None, server: Any = None, **flags: Any):
        self.clock = VirtualClock(100.0)
        self.server = VirtualTransport(self.clock, **(server or {}))
        self.server.fail = fail or self.server.fail
        run = a_run(**flags)
        workload = Workload(run, Model("virtual"))
        self.finished = 0
        self.driver = Driver(
            self.clock,
            self.server,
            workload.sessions(),
            due_times(run, workload),
            make_plan(run, workload),
            self._finish,
        )
        self.driver.start(100.0)
        self.clock.run(100.0 + until)

    def _finish(self) -> None:
        self.finished += 1

    @property
    def columns(self) -> Columns:
        return self.driver.recorder.columns()


@given(
    users=st.integers(1, 9),
    requests=st.integers(1, 40),
    turns=st.integers(1, 3),
    ramp_up=st.sampled_from([0.0, 1.0]),
)
def test_a_closed_loop_sends_what_is_asked_and_never_more_at_once(
    users: int, requests: int, turns: int, ramp_up: float
) -> None:
    played = Played(concurrency=users, requests=requests, turns=turns, ramp_up=ramp_up, max_tokens=3)
    assert played.finished == 1
    assert len(played.server.sent) == len(played.columns.end) == requests
    assert played.server.most <= users
    if not ramp_up:
        assert played.server.most == min(users, requests)


@given(
    rate=st.floats(0.5, 2000),
    slots=st.integers(1, 50),
    arrival=st.sampled_from(["poisson", "constant", "gamma"]),
)
def test_an_open_loop_sends_on_time_however_slow_the_server(rate: float, slots: int, arrival: str) -> None:
    played = Played(rate=rate, requests=50, arrival=arrival, max_tokens=2, server={"slots": slots})
    run = a_run(rate=rate, requests=50, arrival=arrival, max_tokens=2)
    due = due_times(run, Workload(run, Model("virtual")))
    assert due is not None
    assert played.server.times == pytest.approx([100.0 + t for t in islice(due, 50)])
    assert sorted(played.columns.intended) == pytest.approx(played.server.times)
    assert played.finished == 1


def test_what_is_late_is_sent_in_a_burst_and_keeps_its_time() -> None:
    """The loop stops for a second: coordinated omission would forget the wait."""
    played = Played(until=0.5, rate=100.0, arrival="constant", requests=200, max_tokens=1)
    before = played.driver.sent
    played.clock.time += 1.0
    late = played.clock.time
    played.clock.run()
    columns = played.columns
    assert played.driver.sent == 200 and before == 50
    sent_late = columns.sent[columns.sent >= late - 1e-9]
    assert (sent_late[:90] == late).all()
    delays = (columns.sent - columns.intended)[columns.sent == late]
    assert delays.max() == pytest.approx(0.99, abs=0.02) and (columns.sent >= columns.intended - 1e-9).all()


def test_duration_stops_sending_and_lets_answers_come() -> None:
    played = Played(rate=10.0, arrival="constant", duration=1.0, max_tokens=2, server={"ttft": 5.0})
    assert played.server.times == pytest.approx([100.05 + 0.1 * i for i in range(10)])
    assert played.columns.ok.all() and played.finished == 1


def test_drain_gives_up_on_the_rest() -> None:
    played = Played(
        rate=10.0, arrival="constant", duration=1.0, drain=2.0, max_tokens=1, server={"slots": 3, "ttft": 1.5}
    )
    assert played.finished == 1 and played.driver.unfinished == 10 - len(played.columns.end) > 0
    assert played.columns.end.max() <= 100.95 + 2.0 + 1e-9


def test_a_request_that_takes_too_long_ends_as_deadline_exceeded() -> None:
    played = Played(concurrency=2, requests=4, timeout=0.5, max_tokens=10, server={"itl": 0.1})
    assert played.columns.statuses == ["DEADLINE_EXCEEDED"] and played.finished == 1
    assert (played.columns.end - played.columns.sent) == pytest.approx([0.5] * 4)
    assert played.columns.details["DEADLINE_EXCEEDED"] == "no end within --timeout 0.5 s"
    assert (played.columns.messages > 0).all()


def test_a_user_pauses_after_a_failure_and_ends_the_session() -> None:
    played = Played(concurrency=1, requests=3, turns=2, max_tokens=1, fail=lambda number: number == 0)
    assert played.server.times == pytest.approx([100.0, 100.05 + PAUSE, 100.1 + PAUSE])
    assert played.columns.turn.tolist() == [0, 0, 1]
    assert played.driver.recorder.failed == 1


def test_turns_follow_the_answer_after_thinking() -> None:
    played = Played(rate=1.0, arrival="constant", requests=6, turns=3, think_time=2.0, max_tokens=2)
    columns = played.columns
    for turn in (1, 2):
        after, before = columns.where(columns.turn == turn), columns.where(columns.turn == turn - 1)
        assert sorted(after.intended) == pytest.approx([end + 2.0 for end in sorted(before.end)])
    assert [int((columns.turn == turn).sum()) for turn in range(3)] == [2, 2, 2] and played.finished == 1
    assert len(Played(rate=1.0, requests=5, turns=3).server.sent) == 5  # the last session is cut off


def test_an_interrupt_keeps_what_has_come() -> None:
    played = Played(until=0.2, concurrency=5, duration=60.0, max_tokens=4)
    finished = len(played.columns.end)
    played.driver.interrupt()
    assert played.finished == 1 and played.driver.interrupted and played.driver.unfinished == 5
    played.clock.run(1000.0)
    assert len(played.columns.end) == finished == 15  # three times 65 ms
    assert len(played.server.sent) == 20


def test_a_run_without_anything_to_send_ends() -> None:
    def nothing() -> Iterator[float]:
        yield from ()

    clock, over = VirtualClock(), []
    run = a_run(rate=1.0)
    workload = Workload(run, Model("virtual"))
    driver = Driver(
        clock,
        VirtualTransport(clock),
        workload.sessions(),
        nothing(),
        make_plan(run, workload),
        lambda: over.append(1),
    )
    driver.start(0.0)
    clock.run(10**6)
    assert over == [1]


def test_a_trace_is_replayed_at_its_times(tmp_path: Any) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text(
        "".join(f'{{"timestamp": {t}, "input_length": 4, "output_length": 2}}\n' for t in (500, 1500, 2500))
    )
    assert Played(trace=trace).server.times == pytest.approx([100, 101, 102])
    assert Played(trace=trace, trace_speed=2.0).server.times == pytest.approx([100, 100.5, 101])
    assert Played(trace=trace, rate=3.0).server.times == pytest.approx([100, 100.5, 101])  # three in a second
    assert Played(trace=trace, concurrency=1).server.times == pytest.approx([100, 100.055, 100.11])
    assert Played(trace=trace, requests=2).server.times == pytest.approx([100, 101])
