"""How the runs of a model are shared between the prompts that are in prefill."""

from __future__ import annotations

from collections import Counter

# Of each run the oldest prompt has at least a quarter, so that shorter ones never starve it: once
# it is the oldest, it takes four times as many runs as alone at most.
OLDEST_SHARE = 4


def shares(unread: list[tuple[str, int]], max_tokens: int) -> list[int]:
    """How many tokens of each prompt the next run has: ``max_tokens`` together, and one at least.

    ``unread`` has each prompt's caller and how many tokens are left of it, the oldest prompt first.
    The shortest remaining goes first, but each caller's shortest before anyone's second one.
    """
    counts = [1] * len(unread)
    # However many there are, there is something for the oldest.
    left = max(max_tokens - len(unread), max_tokens // OLDEST_SHARE)

    def give(place: int, most: int) -> None:
        nonlocal left
        more = max(0, min(unread[place][1] - counts[place], most, left))
        counts[place] += more
        left -= more

    if unread:
        give(0, max_tokens // OLDEST_SHARE)
    ranks: Counter[str] = Counter()
    order = []
    for place in sorted(range(len(unread)), key=lambda place: unread[place][1]):
        caller, tokens = unread[place]
        order.append((ranks[caller], tokens, place))
        ranks[caller] += 1
    for _, _, place in sorted(order):
        give(place, left)
    return counts
