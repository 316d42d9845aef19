"""A search for the coefficient with which a penalised dictionary reaches a given L0, by trainings of full length.

L0 falls about as a power of the coefficient, but where it lies after so many steps cannot be told beforehand, and a
shorter run is sparser or denser than a long one. So every guess is a whole training with a run folder of its own, and
the best of them is the answer: nothing is trained twice, and a repeated search reads what is there.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

CLOSE = 0.10  # share of the target within which L0 counts as reached
ROUNDS = 10
FLOOR = 0.05  # where L0 is 0 it has no logarithm
POWER = 1.2  # a guess beyond the last goes as far as would do if the coefficient went with this power of 1 / L0,
FACTORS = (2.0, 32.0)  # within these limits
MIDDLE = (0.15, 0.85)  # and where a guess lies between two that have, as shares of the logarithm

Seen = list[tuple[float, float]]
"""Coefficients tried, and the L0 of each."""


def next_coefficient(seen: Sequence[tuple[float, float]], target: float, start: float) -> float:
    """Return the coefficient to try next, after those in `seen`."""
    if not seen:
        return start
    tried = sorted((c, math.log(max(l0, FLOOR) / target)) for c, l0 in seen)
    for (low, above), (high, below) in itertools.pairwise(tried):
        if above > 0 >= below:  # by false position in logarithms, kept off the ends so that the bracket shrinks
            share = min(max(above / (above - below), MIDDLE[0]), MIDDLE[1])
            return _rounded(low * (high / low) ** share)
    least, greatest = FACTORS
    if tried[-1][1] > 0:
        return _rounded(tried[-1][0] * min(max(math.exp(POWER * tried[-1][1]), least), greatest))
    return _rounded(tried[0][0] / min(max(math.exp(-POWER * tried[0][1]), least), greatest))


def best(seen: Sequence[tuple[float, float]], target: float) -> tuple[float, float]:
    """Return the coefficient tried whose L0 is nearest to the target (as a ratio), and that L0."""
    return min(seen, key=lambda one: abs(math.log(max(one[1], FLOOR) / target)))


def close(l0: float, target: float) -> bool:
    return abs(l0 - target) <= CLOSE * target


def search(
    starts: Mapping[str, float], target: float, measure: Callable[[dict[str, float]], dict[str, float]]
) -> dict[str, Seen]:
    """Try coefficients for each variant until its L0 is close to the target or the rounds are over; return all tried.

    measure: coefficients of the variants still under way -> their L0, so that one round is one pass over the rows.
    """
    seen: dict[str, Seen] = {name: [] for name in starts}
    for _ in range(ROUNDS):
        left = [name for name in starts if not any(close(l0, target) for _, l0 in seen[name])]
        if not left:
            break
        guesses = {name: next_coefficient(seen[name], target, starts[name]) for name in left}
        for name, l0 in measure(guesses).items():
            seen[name].append((guesses[name], l0))
    return seen


def _rounded(c: float) -> float:
    return float(f"{c:.4g}")
