"""Whether a new version does worse than the old one, from what became of the requests to both. Pure.

It may be asked again and again while requests come: the confidence intervals hold at all times together, so
that looking often finds no more differences than there are. They are those of a Bernoulli proportion from a
mixture of likelihoods (H. Robbins, "Statistical methods related to the law of the iterated logarithm",
Annals of Mathematical Statistics 41(5), 1970; with a Beta mixture as in S. R. Howard, A. Ramdas,
J. McAuliffe, J. Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences", Annals of
Statistics 49(2), 2021): the share p of errors is excluded when ``Beta-binomial(k of n) / p^k (1-p)^(n-k)``
exceeds ``1 / alpha``, which for the true p happens at any time with probability ``alpha`` at most (Ville).

How long answers take is compared by proportions, too: if more requests to the new version take longer than
``r * t`` than requests to the old one take longer than ``t``, some quantile is more than ``r`` times as
large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import lgamma, log, log1p

from forescale.registry.rollout import Counts

ALPHA = 0.01
"""Probability that two versions that are alike are ever found different."""

SLOW_FRACTION = 0.05
"""Requests that may be slower than allowed: quantiles above 95% are not compared."""

_HALF = 0.5  # of the Beta distribution that is mixed by: Jeffreys' prior
_ROUNDS = 40  # of bisection


def proven_worse(
    old: Counts, new: Counts, bounds_s: Sequence[float], *, max_error_fraction: float, max_slowdown: float
) -> str | None:
    """What is certainly worse, in words, or None.

    Args:
        old: without requests, it is taken to have had no errors; times are not compared then.
        bounds_s: of ``Counts.answers``, ascending.
    """
    if new.errors:
        least, _ = interval(new.errors, new.requests, ALPHA / 4)
        _, most = interval(old.errors, old.requests, ALPHA / 4) if old.requests else (0.0, 0.0)
        if least > most + max_error_fraction:
            return _more_errors(old, new)
    pairs = list(_slower(old, new, bounds_s, max_slowdown))
    for bound_s, slow_old, slow_new in pairs:
        fraction = _fraction(slow_old, sum(old.answers))
        if _fraction(slow_new, sum(new.answers)) <= fraction + SLOW_FRACTION:
            continue  # so the intervals cannot lie apart
        alpha = ALPHA / 4 / len(pairs)
        least, _ = interval(slow_new, sum(new.answers), alpha)
        _, most = interval(slow_old, sum(old.answers), alpha)
        if least > most + SLOW_FRACTION:
            return _longer(bound_s, max_slowdown, old, new, slow_old, slow_new)
    return None


def seems_worse(
    old: Counts, new: Counts, bounds_s: Sequence[float], *, max_error_fraction: float, max_slowdown: float
) -> str | None:
    """The same, of what was counted, certain or not."""
    if _fraction(new.errors, new.requests) > _fraction(old.errors, old.requests) + max_error_fraction:
        return _more_errors(old, new)
    for bound_s, slow_old, slow_new in _slower(old, new, bounds_s, max_slowdown):
        most = _fraction(slow_old, sum(old.answers)) + SLOW_FRACTION
        if _fraction(slow_new, sum(new.answers)) > most:
            return _longer(bound_s, max_slowdown, old, new, slow_old, slow_new)
    return None


def interval(hits: int, trials: int, alpha: float) -> tuple[float, float]:
    """Where a proportion is, at all times together but with a probability of ``alpha``."""
    if not trials:
        return 0.0, 1.0
    misses = trials - hits
    # log of what the mixture makes of it, times alpha: a likelihood below excludes its p.
    level = _log_beta(hits + _HALF, misses + _HALF) - _log_beta(_HALF, _HALF) + log(alpha)
    estimate = hits / trials

    def excluded(p: float) -> bool:
        return hits * log(p) + misses * log1p(-p) < level

    low, high = 0.0, 1.0
    if hits:
        low = _border(0.0, estimate, excluded)
    if misses:
        high = _border(1.0, estimate, excluded)
    return low, high


def _border(outside: float, inside: float, excluded: Callable[[float], bool]) -> float:
    for _ in range(_ROUNDS):
        middle = (outside + inside) / 2
        if excluded(middle):
            outside = middle
        else:
            inside = middle
    return outside


def _slower(
    old: Counts, new: Counts, bounds_s: Sequence[float], max_slowdown: float
) -> Iterator[tuple[float, int, int]]:
    """Bounds, with requests to the old version above them and to the new one above ``max_slowdown`` times."""
    if not sum(old.answers) or not sum(new.answers):
        return
    old_above, new_above = _above(old.answers), _above(new.answers)
    for place, bound_s in enumerate(bounds_s):
        further = next((n for n, other_s in enumerate(bounds_s) if other_s >= max_slowdown * bound_s), None)
        if further is not None:
            yield bound_s, old_above[place], new_above[further]


def _above(answers: Sequence[int]) -> list[int]:
    """Requests above each bound."""
    total = sum(answers)
    return [total - below for below in accumulate(answers)]


def _more_errors(old: Counts, new: Counts) -> str:
    return (
        f"{new.errors} of {new.requests} requests to the new version got no answer, "
        f"of the old one's {old.errors} of {old.requests}"
    )


def _longer(
    bound_s: float, max_slowdown: float, old: Counts, new: Counts, slow_old: int, slow_new: int
) -> str:
    return (
        f"{_fraction(slow_new, sum(new.answers)):.0%} of the new version's answers took longer than "
        f"{bound_s * max_slowdown * 1e3:g} ms, {_fraction(slow_old, sum(old.answers)):.0%} of the old one's "
        f"longer than {bound_s * 1e3:g} ms"
    )


def _fraction(hits: int, trials: int) -> float:
    return hits / trials if trials else 0.0


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
