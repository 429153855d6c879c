"""Draws that are a seed's own, whatever other threads draw or seed meanwhile."""

from __future__ import annotations

import threading

import pytest
import torch

from backend.adapters.own_draws import own_draws

DRAWS = {
    "randn": lambda: torch.randn(4, 3),
    "randn of a list": lambda: torch.randn([4, 3], generator=None, device="cpu"),
    "rand": lambda: torch.rand(4, 3),
    "randn_like": lambda: torch.randn_like(torch.ones(4, 3)),
    "rand_like": lambda: torch.rand_like(torch.ones(4, 3)),
    "randint": lambda: torch.randint(1000, (4, 3)),
    "randperm": lambda: torch.randperm(1000),
    "normal": lambda: torch.normal(torch.zeros(12), torch.ones(12)),
    "normal_": lambda: torch.empty(4, 3).normal_(),
    "uniform_": lambda: torch.empty(4, 3).uniform_(),
    "exponential_": lambda: torch.empty(4, 3).exponential_(),
    "bernoulli": lambda: torch.bernoulli(torch.full((64,), 0.5)),
    "bernoulli_": lambda: torch.empty(64).bernoulli_(0.5),
    "multinomial": lambda: torch.multinomial(torch.ones(1000), 12),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_a_seed_draws_the_same_while_others_seed_and_draw(draw):
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        expected = [DRAWS[draw]() for _ in range(20)]
    over = threading.Event()

    def disturb():
        while not over.is_set():
            torch.manual_seed(0)
            torch.randn(3)

    other = threading.Thread(target=disturb)
    other.start()
    try:
        with own_draws([7], "cpu"):
            drawn = [DRAWS[draw]() for _ in range(20)]
    finally:
        over.set()
        other.join()
    assert all(map(torch.equal, drawn, expected))


@pytest.mark.parametrize("draw", DRAWS)
def test_own_draws_leave_the_global_state_as_it_was(draw):
    before = torch.random.get_rng_state()
    with own_draws([7], "cpu"):
        DRAWS[draw]()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_who_names_a_generator_draws_from_that():
    expected = torch.randn(3, generator=torch.Generator().manual_seed(5))
    with own_draws([7], "cpu"):
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, expected)
