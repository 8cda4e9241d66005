"""Who is served next: by priority, then fairly between owners, then in the order of arrival."""

from hypothesis import given
from hypothesis import strategies as st

from serving import SamplingParams
from serving.engine.core import Request
from serving.engine.waiting import WaitingQueue
from tests.engine.fake import plain


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
