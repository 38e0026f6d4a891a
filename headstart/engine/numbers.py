"""What the numbers of a step tell: that it can't be taken, or that it is far from the steps before it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

BAD_IN_A_ROW = 3  # steps without a finite gradient after which a run ends, whatever the policy
RECENT = 32  # losses that a step is held against
LEAST_RECENT = 16
SPIKE = 8.0  # robust standard deviations
NORMAL_MAD = 1.4826  # of a normal distribution: its standard deviation over its median absolute deviation
LEAST_SPREAD = 0.02  # of the median: what is within this of all others is no spike
LEAST_RISE = 0.5  # nats: where losses are near nothing, a step with one hard row rises by less


def is_spike(loss: float, recent: Sequence[float]) -> bool:
    """Tell whether a loss stands out above recent ones, by their median and median absolute deviation.

    Both hold where up to half of the losses are spikes themselves (Leys et al., 2013).
    """
    if len(recent) < LEAST_RECENT:
        return False
    median = statistics.median(recent)
    deviation = statistics.median(abs(value - median) for value in recent)
    return loss > median + max(LEAST_RISE, SPIKE * max(NORMAL_MAD * deviation, LEAST_SPREAD * abs(median)))
