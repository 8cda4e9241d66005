"""Who is served next: by priority, then fairly between owners, then in the order of arrival."""

from hypothesis import given
from hypothesis import strategies as st

from serving import SamplingParams
from serving.engine.core import Request
from serving.engine.params import MAX_PRIORITY
from serving.engine.waiting import LASTING, PATIENCE, WaitingQueue
from tests.engine.fake import Clock, plain


def request(owner: str, number: int, tokens: int = 10, priority: int = 0) -> Request:
    params = SamplingParams(max_tokens=tokens)
    return Request(f"{owner}{number}", [1], params, owner=owner, priority=priority)


def drained(queue: WaitingQueue) -> list[str]:
    return [queue.take()[0].id for _ in range(len(queue))]


def test_a_crowd_of_one_does_not_keep_another_waiting() -> None:
    queue = WaitingQueue()
    for number in range(100):
        queue.push(request("crowd", number), plain())
    for _ in range(5):
        queue.take()
    queue.push(request("late", 0), plain())
    queue.push(request("late", 1), plain())
    served = drained(queue)
    assert served.index("late0") <= 1 and served.index("late1") <= 3


def test_a_full_queue_serves_the_newest_of_whose_turn_it_is_for_a_while() -> None:
    queue = WaitingQueue(8)
    for number in range(6):
        queue.push(request("crowd", number), plain())
    queue.push(request("late", 0), plain())
    assert not queue.full
    queue.push(request("late", 1), plain())
    assert queue.full
    queue.refused()
    assert [queue.take()[0].id for _ in range(2)] == ["crowd5", "late1"]
    assert drained(queue) == ["crowd0", "late0", "crowd1", "crowd2", "crowd3", "crowd4"], (
        "in their order again"
    )


def test_large_requests_count_for_more() -> None:
    queue = WaitingQueue()
    for number in range(20):
        queue.push(request("large", number, tokens=99), plain())
        queue.push(request("small", number, tokens=9), plain())
    first = drained(queue)[:20]
    assert sum(name.startswith("small") for name in first) >= 17


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(1, 50),
            st.sampled_from([-1, 0, 1]),
            st.sampled_from(["", "take", "refuse"]),
        ),
        max_size=60,
    )
)
def test_nothing_is_lost_and_each_owners_requests_stay_in_order(
    events: list[tuple[str, int, int, str]],
) -> None:
    queue, taken, pushed = WaitingQueue(16), [], []
    for number, (owner, tokens, priority, then) in enumerate(events):
        queue.push(request(owner, number, tokens, priority), plain())
        pushed.append(number)
        if then == "refuse":
            queue.refused()
        if then == "take":
            best = max(-entry[0] for entry in queue._heap)
            taken.append(queue.take()[0])
            assert taken[-1].priority == best
    taken += [queue.take()[0] for _ in range(len(queue))]
    assert sorted(int(r.id[1:]) for r in taken) == pushed
    quiet = WaitingQueue()
    for number, (owner, tokens, _, _) in enumerate(events):
        quiet.push(request(owner, number, tokens), plain())
    order = drained(quiet)
    for owner in "abc":
        mine = [int(name[1:]) for name in order if name.startswith(owner)]
        assert mine == sorted(mine)


def test_a_request_is_withdrawn() -> None:
    queue = WaitingQueue()
    wanted, other = request("a", 0), request("a", 1)
    queue.push(wanted, plain())
    queue.push(other, plain())
    queue.withdraw(wanted)
    assert queue.first()[0] is other and len(queue) == 1


def test_a_full_queue_is_shared_fairly() -> None:
    queue = WaitingQueue(4)
    for number in range(4):
        queue.push(request("a", number), plain())
    assert queue.make_room(request("a", 4)) is None  # one's own places are not for taking
    assert queue.make_room(request("b", 0, priority=-1)) is None  # nor those of a higher priority
    made = []
    for number in range(2):
        newcomer = request("b", number)
        made.append(queue.make_room(newcomer))
        queue.push(newcomer, plain())
    assert [loser.id for loser in made if loser] == ["a3", "a2"]
    assert queue.make_room(request("b", 2)) is None  # both have two
    assert [queue.take()[0].id for _ in range(4)] == ["a0", "b0", "a1", "b1"]


def test_who_lost_a_place_does_not_wait_for_work_that_was_not_done() -> None:
    queue = WaitingQueue(3)
    for number in range(3):
        queue.push(request("a", number, tokens=1000), plain())
    assert queue.make_room(request("b", 0)) is not None
    queue.push(request("b", 0), plain())
    assert queue.take()[0].id == "a0"
    queue.push(request("a", 3, tokens=1000), plain())
    queue.push(request("b", 1, tokens=2500), plain())
    queue.push(request("b", 2), plain())
    assert [queue.take()[0].id for _ in range(5)] == ["b0", "b1", "a1", "a3", "b2"]


def pushed(queue: WaitingQueue, clock: Clock, *requests: Request) -> None:
    for one in requests:
        one.arrival = clock.now
        queue.push(one, plain())


def test_a_queue_that_is_long_and_does_not_grow_is_served_in_order() -> None:
    """60 users who ask again when they have their answer, of which there are four a second: nobody is forgotten."""
    clock = Clock()
    queue, waits = WaitingQueue(256, 1.0, clock), []
    pushed(queue, clock, *(request("a", number) for number in range(60)))
    for number in range(60, 3000):
        clock.now += 0.25
        waits.append(clock.now - queue.take()[0].arrival)
        pushed(queue, clock, request("a", number))
    assert max(waits[1000:]) == 15.0 and not queue.newest_first


def test_a_queue_that_grows_beyond_its_target_serves_the_newest_until_nobody_waits_so_long() -> None:
    clock = Clock()
    queue, number = WaitingQueue(256, 1.0, clock), 0
    while not queue.newest_first:
        assert not number or queue.take()[0].id == f"a{number // 2 - 1}", "in order, so far"
        clock.now += 0.1
        pushed(queue, clock, request("a", number), request("a", number + 1))
        number += 2
    assert 1.0 < clock.now < 3.0
    assert queue.take()[0].id == f"a{number - 1}"
    while queue.newest_first:
        clock.now += 0.01
        queue.take()
    oldest = queue.oldest()
    assert oldest is None or clock.now - oldest <= 1.0


def test_where_others_are_refused_for_long_those_who_wait_in_vain_are_told() -> None:
    clock = Clock()
    queue = WaitingQueue(8, 1.0, clock, needed=4)
    moved = request("a", 1, priority=MAX_PRIORITY + 1)
    begun = request("a", 2)
    begun.resumed = [5]
    pushed(queue, clock, request("a", 0), moved, begun, *(request("b", number) for number in range(3, 8)))
    queue.refused()
    clock.now += LASTING
    assert queue.most == 8 and not queue.give_up(), "a burst is not more than there is room for"
    queue.refused()
    assert queue.most == 4
    assert [r.id for r in queue.give_up()] == ["b3", "b4", "b5"], "of whoever has most, the oldest"
    assert [r.id for r in queue.give_up()] == ["a0"], "a place elsewhere, or a part of an answer, is kept"
    assert queue.full and not queue.give_up()
    for _ in range(PATIENCE):
        clock.now += 1
        queue.refused()
    assert [r.id for r in queue.give_up()] == ["b6", "b7"]
    clock.now += LASTING + 1
    assert queue.most == 8, "it is over"
    assert sorted(drained(queue)) == ["a1", "a2"]


def test_without_a_target_nobody_is_given_up() -> None:
    clock = Clock()
    queue = WaitingQueue(1, None, clock)
    pushed(queue, clock, request("a", 0))
    queue.refused()
    clock.now = 1e6
    assert not queue.give_up()


def test_whoever_cancels_does_not_wait_for_what_was_cancelled() -> None:
    queue = WaitingQueue()
    many = [request("a", number, tokens=100) for number in range(50)]
    for one in many:
        queue.push(one, plain())
    for one in many[:-1]:
        queue.withdraw(one)
    for number in range(5):
        queue.push(request("b", number, tokens=100), plain())
    queue.push(request("a", 50, tokens=100), plain())
    served = drained(queue)
    assert served[0] == "a49" and served.index("a50") <= 3
