"""What is left to do with masks that a model proposes: take the best, and draw them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def best_boxes(boxes: np.ndarray, scores: np.ndarray, most_overlap: float) -> list[int]:
    """Which boxes to keep, best first: those that overlap none better by more than a share.

    The share is of what two boxes cover together; boxes are ``[left, top, right, bottom]``.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = np.argsort(-scores, kind="stable")
    kept = []
    while left.size:
        best, left = left[0], left[1:]
        kept.append(int(best))
        corner = np.maximum(boxes[best, :2], boxes[left, :2])
        sides = (np.minimum(boxes[best, 2:], boxes[left, 2:]) - corner).clip(0)
        shared = sides[:, 0] * sides[:, 1]
        # Not as a quotient: of two boxes without an area that would be no number.
        left = left[~(shared > most_overlap * (areas[best] + areas[left] - shared))]
    return kept


def mask_of(runs: Mapping[str, Any]) -> np.ndarray:
    """A mask from the lengths of its runs, down the columns, the first of them outside."""
    height, width = runs["size"]
    inside = np.arange(len(runs["counts"])) % 2 == 1
    return np.repeat(inside, runs["counts"]).reshape(width, height).T


def within(sides: tuple[int, int], most: int) -> tuple[int, int]:
    """Two sides, made smaller to have so many pixels at most."""
    one, other = sides
    scale = min(1.0, (most / (one * other)) ** 0.5)
    return max(1, int(one * scale)), max(1, int(other * scale))


def enlarged(numbers: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map or a mask at another height and width: each place has its nearest one's number."""
    if numbers.shape == size:
        return numbers
    rows, columns = (
        np.arange(side) * of // side for side, of in zip(size, numbers.shape, strict=True)
    )
    larger: np.ndarray = numbers[rows[:, None], columns]
    return larger
