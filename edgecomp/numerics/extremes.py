"""How far a value may reach on samples that were not seen: their largest values, extrapolated.

The largest of many values is distributed by Gumbel's law for all but heavy tails (Gumbel, "Statistics of
Extremes", 1958); its two parameters follow from mean and standard deviation of the samples' largest values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_EULER = 0.5772156649015329
LEAST_SAMPLES = 8
"""With fewer samples nothing is extrapolated."""


@dataclass
class Extremes:
    """Count, mean and sum of squared deviations of the samples' largest values (Welford 1962)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        before = value - self.mean
        self.mean += before / self.count
        self.squares += before * (value - self.mean)

    def level(self, one_in: float) -> float:
        """The value that one sample in `one_in` goes beyond; -inf where samples are too few to tell.

        >>> # samples of mean 10 and standard deviation 1, one in 300: 10 + 0.78 * (ln 300 - 0.577) = 14.0
        """
        if self.count < LEAST_SAMPLES:
            return -math.inf
        spread = math.sqrt(6 * self.squares / (self.count - 1)) / math.pi
        return self.mean + spread * (math.log(one_in) - _EULER)
