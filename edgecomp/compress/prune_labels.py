"""Labels of tensor positions: which channels of which tensors live and die together.

Every position along every dimension of a parameter has a label; operations of the traced graph make labels
equal. Labels that end up equal are removed together or not at all: the dependency groups of DepGraph (Fang
et al. 2023), found position by position, so that concatenation and flattening need no special offsets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FIXED = -1
"""Label of a position that is never removed: inputs, spatial positions, constants."""

Dims = list[np.ndarray]
"""One int64 label array for each dimension of a tensor."""


class Labels:
    """A union-find over labels, with a reason where a class of labels must stay."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._reason: dict[int, str] = {}

    def fresh(self, count: int) -> np.ndarray:
        """`count` new labels."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def find(self, label: int) -> int:
        """The representative of the label's class."""
        root = label
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[label] != root:
            self._parent[label], label = root, self._parent[label]
        return root

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """Representatives of an array of labels; FIXED stays FIXED."""
        return np.array([FIXED if x == FIXED else self.find(int(x)) for x in labels], dtype=np.int64)

    def lock(self, labels: np.ndarray, reason: str) -> None:
        """These positions stay; the first reason given is the one that is reported."""
        for label in labels:
            if label != FIXED:
                self._reason.setdefault(self.find(int(label)), reason)

    def reason(self, label: int) -> str | None:
        """Why the class of this label stays, or None when it can be removed."""
        return self._reason.get(self.find(label))

    def unite(self, first: np.ndarray, second: np.ndarray, where: str) -> np.ndarray:
        """Make two arrays of one length equal, position by position; a FIXED partner locks the other."""
        for a, b in zip(first, second, strict=True):
            if a == FIXED or b == FIXED:
                self.lock(np.array([a, b]), f"meets a tensor of fixed width at {where}")
            else:
                self._join(int(a), int(b))
        return np.where(first == FIXED, second, first)

    def _join(self, a: int, b: int) -> None:
        keep, gone = self.find(a), self.find(b)
        if keep == gone:
            return
        self._parent[gone] = keep
        if gone in self._reason:
            self._reason.setdefault(keep, self._reason.pop(gone))


def fixed(shape: Sequence[int]) -> Dims:
    """Dims of a tensor that is never pruned."""
    return [np.full(int(n), FIXED) for n in shape]


def labelled(dim: np.ndarray) -> bool:
    """True when some position of a dimension of more than one could be removed."""
    return len(dim) > 1 and bool((dim != FIXED).any())
