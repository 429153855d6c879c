"""The prefix cache: whose prompts are found, what is kept, and who loses what when it is full."""

from __future__ import annotations

import pytest
import torch

from backend.adapters.prefixes import LEAST, STALE_S, Prefixes

TOKEN = 2 * 4  # bytes of a token's keys and values in ``layers_of``


def layers_of(ids):
    part = torch.tensor(ids, dtype=torch.float32)[None, None, :, None]
    return [(part, part)]


def prompt(first, length=LEAST + 1):
    return [first, *range(length - 1)]


def keep(cache, caller, ids):
    cache.keep(caller, ids, layers_of(ids))


def length(cache, caller, ids):
    found = cache.find(caller, ids)
    return 0 if found is None else found.length


def held(cache):
    return sum(one.size for one in cache._kept)


def test_prefixes_are_kept_while_there_is_room_the_last_used_longest():
    one, two, three = map(prompt, (1, 2, 3))
    cache = Prefixes(2 * TOKEN * len(one))
    keep(cache, "a", one)
    keep(cache, "a", two)
    assert length(cache, "a", [*one, 7]) == len(one)
    keep(cache, "a", three)
    assert cache.find("a", two) is None
    found = cache.find("a", [*one[:-1], 99])
    assert found.length == len(one) - 1
    assert found.layers[0][0].flatten().tolist() == one[:-1]
    longer = [*three, 5]
    keep(cache, "a", longer)  # too much beside `one`; it includes `three`
    assert cache.find("a", one) is None
    assert length(cache, "a", [*longer, 1]) == len(longer)
    keep(cache, "a", three)
    assert held(cache) == TOKEN * len(longer)


@pytest.mark.parametrize("ids", [prompt(8, 1000), prompt(9, LEAST - 1)], ids=["long", "short"])
def test_what_is_too_long_or_too_short_is_not_kept(ids):
    cache = Prefixes(500 * TOKEN)
    keep(cache, "a", prompt(1))
    keep(cache, "a", ids)
    assert cache.find("a", ids) is None
    assert length(cache, "a", prompt(1)) == LEAST + 1


@pytest.mark.parametrize("other", ["b", ""], ids=["another", "no name"])
def test_a_caller_finds_its_own_prefixes_alone(other):
    cache, ids = Prefixes(10**6), prompt(1, 100)
    keep(cache, "a", ids)
    assert cache.find(other, ids) is None
    keep(cache, other, ids[:50])  # not included in the other caller's
    assert (length(cache, "a", ids), length(cache, other, ids)) == (100, 50)
    keep(cache, other, ids)
    assert (length(cache, "a", ids), length(cache, other, ids)) == (100, 100)


def test_prefixes_are_shared_where_an_entry_says_so():
    cache, ids = Prefixes(10**6, shared=True), prompt(1)
    keep(cache, "a", ids)
    assert length(cache, "b", ids) == len(ids)
    keep(cache, "b", ids)
    assert held(cache) == TOKEN * len(ids)


def test_one_callers_prefixes_do_not_push_out_others():
    ids = prompt(0)
    cache = Prefixes(10 * TOKEN * len(ids))
    for caller in "abc":
        keep(cache, caller, prompt(1))
    for first in range(100):
        keep(cache, "d", prompt(first))
        assert held(cache) <= 10 * TOKEN * len(ids)
    assert [length(cache, caller, prompt(1)) for caller in "abc"] == [len(ids)] * 3
    assert [length(cache, "d", prompt(first)) for first in range(93, 100)] == [len(ids)] * 7
    huge = prompt(101, 8 * len(ids))  # more than its share, whatever else of its own goes
    keep(cache, "d", huge)
    assert cache.find("d", huge) is None
    assert [length(cache, caller, prompt(1)) for caller in "abc"] == [len(ids)] * 3
    assert length(cache, "d", prompt(99)) == len(ids)


def test_a_caller_who_comes_late_has_its_share():
    ids = prompt(0)
    cache = Prefixes(10 * TOKEN * len(ids))
    for first in range(10):
        keep(cache, "a", prompt(first))
    for first in range(10):
        keep(cache, "b", prompt(first))
    for caller in "ab":
        found = [length(cache, caller, prompt(first)) for first in range(10)]
        assert found == [0] * 5 + [len(ids)] * 5


def test_what_has_not_been_used_for_long_makes_way_for_anyone():
    now = [0.0]
    ids = prompt(0)
    cache = Prefixes(4 * TOKEN * len(ids), clock=lambda: now[0])
    for caller in "abc":
        keep(cache, caller, prompt(1))
    now[0] = STALE_S - 1
    assert length(cache, "c", prompt(1)) == len(ids)  # used again
    huge = prompt(2, 3 * len(ids))
    keep(cache, "d", huge)
    assert cache.find("d", huge) is None
    now[0] = STALE_S + 1
    keep(cache, "d", huge)
    assert length(cache, "d", huge) == len(huge)
    assert length(cache, "c", prompt(1)) == len(ids)
    assert held(cache) <= 4 * TOKEN * len(ids)
