"""The thresholds by which the training controller decides."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When a plan is given up for another.

    Attributes:
        adapt: whether to change plans at all; False only keeps watch.
        horizon_steps: a gain is counted over this many steps where nothing says how long it will last.
        min_gain: smallest fraction of the step time a new plan must be predicted to save.
        sudden_gain: the same where only the last steps, not what is known to come or has lasted for long,
            call for it: not below what predictions are wrong by.
        move_margin: a predicted gain must exceed the move's cost by this fraction of it.
        move_fixed_s: seconds a repartition costs beside sending what changes hands, until one was seen.
        patience_steps: how many more steps a new plan must have been able to do by now, since the devices
            changed. What passes by itself is so left alone, and the more a plan saves, the sooner it comes.
        settle_steps: steps after a start that are not judged (allocations, warm caches).
        cooldown_steps: least number of steps between a decision on deviations and the next.
        calm_steps: repartitions are remembered for so long; after two, the next is asked for twice the
            ``sudden_gain``.
        min_band, initial_band: half width of the band round a device's predicted log time, at least,
            and until ``calibration_steps`` observations are known.
        max_band: the same at most: a device that takes twice as long is never an ordinary one.
        calibration_steps: observations of a level after which the band is the forecaster's own.
        allowance: band half widths a deviation may have before it is evidence.
        clip: band half widths for which one step's deviation counts at most, so that an outlier
            alone is not enough.
        evidence: sum of (clipped deviation - allowance) that calls for a decision; with the defaults
            four clipped steps in a row.
        big_shift: change of log time that is judged even in the cool-down of a decision to stay.
        revisit_steps: an idle device that was too slow is taken to be as profiled again after so many
            steps, each time after twice as many.
        min_run_steps: batches of a new shape that must be in view before the run is taken to last.
        review_steps: with shapes that change all the time, steps between looks at their mixture.
    """

    adapt: bool = True
    horizon_steps: int = 50
    min_gain: float = 0.05
    sudden_gain: float = 0.1
    move_margin: float = 0.5
    move_fixed_s: float = 0.02
    patience_steps: float = 1.75
    settle_steps: int = 2
    cooldown_steps: int = 10
    calm_steps: int = 200
    min_band: float = 0.03
    initial_band: float = 0.25
    max_band: float = 0.7
    calibration_steps: int = 12
    allowance: float = 0.75
    clip: float = 2.0
    evidence: float = 4.5
    big_shift: float = 0.2
    revisit_steps: int = 100
    min_run_steps: int = 3
    review_steps: int = 16
