"""A model's queue: callers take turns in it, whatever each has queued."""

from __future__ import annotations

import random

import pytest

from backend.engine.batch_queue import BatchQueue
from backend.engine.calls import Call
from backend.engine.jobs import Job


def job(caller, count=1, **options):
    call = Call(
        request_id="r",
        model_id="m",
        inputs=[f"{caller}{number}" for number in range(count)],
        options=options,
        seeds=None,
        timeout_s=60,
        caller=caller,
    )
    return Job(call, lambda told: None)


def queue_of(*jobs):
    queue = BatchQueue()
    for one in jobs:
        queue.put(one.items)
    return queue


def names(items):
    return [item.input for item in items]


def take_equals(queue, most):
    return queue.take_equals(most)


def take_joining(queue, most):
    return queue.take_while(lambda item: True, most)


def take_singly(queue, most):
    return [queue.take() for _ in range(min(most, len(queue)))]


WAYS = [take_equals, take_joining, take_singly]


@pytest.mark.parametrize("take", WAYS)
def test_one_callers_many_inputs_do_not_stand_before_anothers_one(take):
    queue = queue_of(job("a", 60), job("b"), job("c", 2))
    assert names(take(queue, 5)) == ["a0", "b0", "c0", "a1", "c1"]
    assert names(take(queue, 2)) == ["a2", "a3"]
    assert len(queue) == len(list(queue)) == 56


@pytest.mark.parametrize("take", WAYS)
def test_whoever_comes_later_has_a_turn_before_the_others_have_a_second(take):
    queue = queue_of(job("a", 9))
    take(queue, 4)
    queue.put(job("b").items)
    assert names(take(queue, 2)) in (["a4", "b0"], ["b0", "a4"])


@pytest.mark.parametrize("take", WAYS)
def test_one_callers_inputs_keep_their_order(take):
    queue = queue_of(job("a", 3), job("a", 2))
    assert names(take(queue, 4)) == ["a0", "a1", "a2", "a0"]
    assert names(take(queue, 4)) == ["a1"]


def test_who_has_other_options_is_passed_over_once_at_most():
    queue = queue_of(job("a", 60, k=1), job("b", 1, k=2), job("c", 1, k=1))
    assert names(queue.take_equals(4)) == ["a0", "c0", "a1", "a2"]
    assert names(queue.take_equals(4)) == ["b0"]


def test_a_run_that_always_has_new_inputs_overtakes_nobody():
    queue = queue_of(job("a", 3), job("b", 1, alone=True), job("a", 3))

    def joins(item):
        return not item.options.get("alone")

    assert names(queue.take_while(joins, 9)) == ["a0"]
    assert queue.take_while(joins, 9) == []
    assert names([queue.take()]) == ["b0"]


@pytest.mark.parametrize("take", WAYS)
def test_what_is_put_back_is_taken_first_again_and_in_its_order(take):
    queue = queue_of(job("a", 3), job("b", 2))
    taken = take(queue, 3)
    queue.put_back(taken)
    assert names(take(queue, 5)) == ["a0", "b0", "a1", "b1", "a2"]
    assert len(queue) == 0


def test_nothing_is_lost_and_nothing_comes_twice():
    draw = random.Random(7)
    queue, here, gone = BatchQueue(), set(), 0
    for _ in range(2000):
        step = draw.choice(["put", "take", "back", "keep"])
        if step == "put":
            items = job(draw.choice("abcd"), draw.randint(1, 5), k=draw.randint(0, 1)).items
            queue.put(items)
            here |= set(items)
        elif step == "keep":
            kept = {item for item in queue if draw.random() < 0.9}
            queue.keep(lambda items, kept=kept: [item for item in items if item in kept])
            here &= kept
        elif len(queue):
            taken = draw.choice(WAYS)(queue, draw.randint(1, 6))
            assert taken
            if step == "back":
                queue.put_back(taken)
            else:
                gone += len(taken)
                here -= set(taken)
        assert len(queue) == len(here)
        assert set(queue) == here
    assert gone > 500
    assert set(queue.clear()) == here
    assert len(queue) == 0


@pytest.mark.parametrize(("sizes", "runs"), [("llls", ["a0", "a1", "a2"]), ("slll", ["a0"])])
def test_who_has_nothing_in_the_group_that_runs_keeps_its_turn(sizes, runs):
    def group(batch):
        alike = [sizes[int(item.input[1])] for item in batch]
        return [item for item, size in zip(batch, alike, strict=True) if size == alike[0]][:3]

    queue = queue_of(job("a", 4), job("c", 1, k=2))
    assert names(queue.take_equals(9, group)) == runs
    assert names(queue.take_equals(9, group)) == ["c0"]


@pytest.mark.parametrize(
    ("queued", "new", "out"),
    [
        pytest.param({"a": [3, 3]}, ("b", 1), ["a"], id="the last one of who has most"),
        pytest.param({"a": [6]}, ("b", 5), ["a"], id="less than they have"),
        pytest.param({"a": [2, 2], "b": [2]}, ("b", 2), [], id="as much as they have"),
        pytest.param({"a": [6]}, ("a", 1), [], id="not of its own"),
        pytest.param({"a": [1] * 6}, ("b", 3), ["a"] * 3, id="several"),
        pytest.param({"a": [1] * 6}, ("b", 4), [], id="not in part"),
        pytest.param({"a": [2], "b": [2], "c": [2]}, ("d", 1), ["a"], id="of three"),
    ],
)
def test_who_has_less_queued_gets_the_room_of_who_has_most(queued, new, out):
    jobs = [job(caller, count) for caller, counts in queued.items() for count in counts]
    queue = queue_of(*jobs)
    pushed = queue.push_out(job(*new).items, 6)
    assert [one.call.caller for one in pushed] == out
    assert pushed == [one for one in reversed(jobs) if one in pushed]
    assert set(queue) == {item for one in jobs if one not in pushed for item in one.items}
    assert len(queue) == len(list(queue))
    if out:
        assert len(queue) + new[1] <= 6


def test_a_job_that_has_begun_is_not_pushed_out():
    queue = queue_of(job("a", 2), job("a", 3))
    assert names(queue.take_equals(3)) == ["a0", "a1", "a0"]
    assert queue.push_out(job("b").items, 2) == []
    queue.put(job("a", 2).items)
    assert len(queue.push_out(job("b").items, 4)) == 1
    assert len(queue) == 2
