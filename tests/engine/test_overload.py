"""Depth is shed before requests are, in virtual time: the governor under three times the capacity, and requests that
are as deep as their deadline allows."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from serving.engine.core import Request
from serving.engine.depth import DepthPolicy, ExitReason
from serving.engine.news import FinishReason, Output
from serving.engine.params import SamplingParams
from serving.errors import OverloadedError
from tests.engine.fake import FakeRunner, assert_no_leak, looped, make_engine, reference

DEPTHS, SLOTS, TOKENS = 6, 8, 6
PATH = looped(DEPTHS)
TIMEOUT_S, WAIT_S = 4.0, 0.5


def cost(stage: int, tokens: int) -> float:
    """Seconds: the core is what costs."""
    return {0: 0.002, 1: 0.02, 2: 0.002}[stage] * (0.25 + 0.75 * tokens / SLOTS)


FULL_CAPACITY = SLOTS / (TOKENS * sum(cost(node.stage, SLOTS) for node in PATH.nodes))
"""Requests a second, every token to the full depth and every batch full."""


@dataclass
class Day:
    """What came of a stream of requests."""

    waits: list[float] = field(default_factory=list)  # to the first token, of those that got one
    started: dict[int, float] = field(default_factory=dict)  # when each of them got it
    given_up: dict[int, float] = field(
        default_factory=dict
    )  # how long those had waited that were refused late
    failed: int = 0
    outputs: dict[str, Output] = field(default_factory=dict)


def live_through(
    load: float,
    *,
    governed: bool,
    floor: int | None,
    count: int = 150,
    queue: int = 4 * SLOTS,
    timeout_s: float = TIMEOUT_S,
    target_s: float | None = None,
) -> Day:
    """`load` times the capacity, evenly spaced. Each request has a timeout, and the queue a bound."""
    arrivals = [i / (load * FULL_CAPACITY) for i in range(count)]
    return live(
        arrivals,
        timeout_s,
        shed_wait_s=WAIT_S if governed else None,
        min_depth=floor,
        max_waiting=queue,
        queue_target_s=target_s,
    )


def live(
    arrivals: list[float],
    timeout_s: float,
    owner: Callable[[int], str] = lambda number: "",
    **options: object,
) -> Day:
    """A request at each of these times, each of its `owner`."""
    runner = FakeRunner(PATH, cost=cost)
    engine = make_engine(runner, SLOTS, **options)
    day, requests, pending = Day(), [], list(enumerate(arrivals))
    while pending or engine.busy:
        if not engine.busy:
            runner.clock.now = max(runner.clock.now, pending[0][1])
        for given_up in engine.give_up():
            day.failed += 1
            day.given_up[int(given_up.id)] = runner.clock.now - given_up.arrival
        while pending and pending[0][1] <= runner.clock.now:
            i, arrived = pending.pop(0)
            params = SamplingParams(max_tokens=TOKENS, depth="full")
            request = Request(str(i), [i % 997, 3], params, owner=owner(i), deadline=arrived + timeout_s)
            try:
                day.failed += engine.submit(request) is not None
                requests.append(request)
            except OverloadedError:
                day.failed += 1
        for out in engine.step():
            day.outputs.setdefault(out.request_id, Output(out.request_id, 0)).extend(out)
    day.started = {int(r.id): r.first_token for r in requests if r.first_token is not None}
    day.waits = [started - arrivals[number] for number, started in day.started.items()]
    day.failed += sum(out.finish_reason is not FinishReason.LENGTH for out in day.outputs.values())
    assert_no_leak(engine)
    return day


def test_three_times_the_capacity_costs_depth_and_not_requests() -> None:
    governed = live_through(3.0, governed=True, floor=1)
    alone = live_through(3.0, governed=False, floor=1)
    assert governed.failed < 0.05 * 150 < alone.failed, (governed.failed, alone.failed)
    assert max(governed.waits) < 3 * WAIT_S
    assert sum(w < WAIT_S for w in governed.waits) > 2 * sum(w < WAIT_S for w in alone.waits)
    reasons = {reason for out in governed.outputs.values() for reason in out.exit_reasons}
    assert reasons == {ExitReason.FULL_DEPTH, ExitReason.GOVERNED}
    assert {reason for out in alone.outputs.values() for reason in out.exit_reasons} == {
        ExitReason.FULL_DEPTH
    }


def test_ten_times_the_capacity_leaves_as_much_goodput_as_its_peak() -> None:
    """Nearly all that is served has its first token in time; a queue that is full in its order would give nearly
    none."""

    def goodput(load: float, seconds: float = 20.0) -> float:
        day = live_through(load, governed=False, floor=None, count=int(load * FULL_CAPACITY * seconds))
        return sum(w < 2 * WAIT_S for w in day.waits) / seconds

    assert goodput(10.0) > 0.9 * max(goodput(load) for load in (0.8, 0.9, 1.0))


def in_time(load: float, seconds: float = 20.0) -> float:
    """Requests a second that have their first token in time. The queue has room for 24 seconds' work."""
    count = int(load * FULL_CAPACITY * seconds)
    day = live_through(
        load, governed=False, floor=None, count=count, queue=256, timeout_s=600, target_s=WAIT_S
    )
    return sum(w < 2 * WAIT_S for w in day.waits) / seconds


@pytest.fixture(scope="module")
def peak() -> float:
    return max(map(in_time, (0.8, 0.9, 1.0)))


@pytest.mark.parametrize("load", [1.1, 1.5, 3.0, 10.0])
def test_a_queue_that_grows_leaves_as_much_goodput_as_its_peak(load: float, peak: float) -> None:
    """In its order, everybody would have waited for most of it."""
    assert in_time(load) > 0.9 * peak


def test_when_an_overload_is_over_it_is_over() -> None:
    """Three times the capacity for 30 seconds, then nine tenths of it: soon those who come wait no longer than ever,
    and those of the overload have been served or told."""
    crowd = [i / (3 * FULL_CAPACITY) for i in range(int(90 * FULL_CAPACITY))]
    after = [30 + i / (0.9 * FULL_CAPACITY) for i in range(int(45 * FULL_CAPACITY))]
    day = live(crowd + after, 600, max_waiting=256, queue_target_s=WAIT_S)
    waits = [day.started[i] - at for i, at in enumerate(crowd + after) if at > 35 and i in day.started]
    late = sum(at > 35 for at in after) - len(waits)
    assert sum(w < 2 * WAIT_S for w in waits) > 0.9 * (len(waits) + late)
    assert day.given_up
    assert day.failed == len(crowd + after) - len(day.started), "nobody is left without an answer"


@pytest.mark.parametrize("crowd", [1.0, 20.0])
def test_a_crowd_of_one_key_costs_another_nothing_that_shows(crowd: float) -> None:
    """One key offers that many times the capacity, two others three tenths of it each, for 20 seconds: all of theirs is
    served, and has its first token within about the time that a request takes."""
    seconds, rates = 20, {"crowd": crowd, "ann": 0.3, "bob": 0.3}
    gaps = {name: 1 / (rate * FULL_CAPACITY) for name, rate in rates.items()}
    offered = sorted((i * gap, name) for name, gap in gaps.items() for i in range(int(seconds / gap)))
    day = live([at for at, _ in offered], 600, lambda i: offered[i][1], max_waiting=64, queue_target_s=WAIT_S)
    service_s = SLOTS / FULL_CAPACITY
    for name in ("ann", "bob"):
        theirs = [i for i, (_, owner) in enumerate(offered) if owner == name]
        waits = sorted(day.started[i] - offered[i][0] for i in theirs if i in day.started)
        assert len(waits) == len(theirs), "nobody of theirs is refused"
        assert waits[len(waits) * 95 // 100] < 2 * service_s and waits[-1] < 3 * service_s
    served = sum(offered[i][1] == "crowd" for i in day.started if offered[i][0] > 2)
    assert served > 0.3 * FULL_CAPACITY * (seconds - 2), "and the crowd has the rest"


def test_with_floors_at_the_full_depth_nothing_changes_but_the_queue() -> None:
    governed = live_through(3.0, governed=True, floor=DEPTHS)
    alone = live_through(3.0, governed=False, floor=DEPTHS)
    assert governed.waits == alone.waits and governed.failed == alone.failed
    assert governed.outputs == alone.outputs
    for out in governed.outputs.values():
        ids, depths = reference(PATH, [int(out.request_id) % 997, 3], len(out.ids))
        assert (out.ids, out.depths) == (ids, depths)


def test_below_the_capacity_nothing_is_shed() -> None:
    day = live_through(0.7, governed=True, floor=1, count=60)
    assert day.failed == 0
    assert {depth for out in day.outputs.values() for depth in out.depths} == {DEPTHS}


def test_what_was_shed_is_given_back() -> None:
    """After a burst, tokens reach the full depth again."""
    runner = FakeRunner(PATH, cost=cost)
    engine = make_engine(runner, SLOTS, shed_wait_s=WAIT_S, min_depth=1)
    for i in range(20 * SLOTS):
        engine.submit(Request(str(i), [i % 997], SamplingParams(max_tokens=TOKENS)))
    engine.submit(Request("long", [5], SamplingParams(max_tokens=900), priority=1))
    depths: list[int] = []
    while engine.busy:
        depths += [d for out in engine.step() if out.request_id == "long" for d in out.depths]
    assert min(depths) == 1 and set(depths[-100:]) == {DEPTHS}


@pytest.mark.parametrize(
    ("timeout", "shallowest"), [(100.0, DEPTHS), (3.2, 3), (1.6, 1)], ids=["generous", "half", "tight"]
)
def test_as_deep_as_the_deadline_allows(timeout: float, shallowest: int) -> None:
    """40 tokens of 0.12 s at the full depth: with 1.6 s there is time for two passes each, at most. It is used."""
    runner = FakeRunner(PATH, cost=lambda stage, tokens: {0: 0.001, 1: 0.02, 2: 0.001}[stage])
    engine = make_engine(runner, 1)
    policy = DepthPolicy.deadline()
    engine.submit(Request("a", [5], SamplingParams(max_tokens=40, depth=policy), deadline=timeout))
    made = Output("a", 0)
    while engine.busy:
        for out in engine.step():
            made.extend(out)
    assert made.finish_reason is FinishReason.LENGTH and runner.clock.now <= timeout
    assert runner.clock.now >= 0.8 * min(timeout, 40 * 0.12)
    assert min(made.depths) == shallowest
    late = {r for d, r in zip(made.depths, made.exit_reasons, strict=True) if d < DEPTHS}
    assert late == (set() if shallowest == DEPTHS else {ExitReason.OUT_OF_TIME})


def test_a_deadline_does_not_go_below_the_floor() -> None:
    runner = FakeRunner(PATH)
    engine = make_engine(runner, 1)
    policy = DepthPolicy.deadline(min_depth=2)
    engine.submit(Request("a", [5], SamplingParams(max_tokens=40, depth=policy), deadline=60.0))
    depths: list[int] = []
    while engine.busy:
        depths += [d for out in engine.step() for d in out.depths]
    assert min(depths) == 2 and len(depths) < 40, "the floor holds, and the deadline ends it"
