"""How sure a mean over seeds is."""

import math

#: Half-width of a 90 % interval of a mean, in standard errors, for 2, 3, … 10 seeds (Student's t); more take the last.
STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)


def half_interval(deviation: float, seeds: int) -> float:
    """Half of the 90 % interval of a mean over at least two seeds, from their sample standard deviation."""
    return STUDENT[min(seeds - 2, len(STUDENT) - 1)] * deviation / math.sqrt(seeds)
