"""Student's t: the 95 % confidence interval of a mean over few seeds."""

from __future__ import annotations

import math

#: Two-sided 95 %, of 1, 2, ... degrees of freedom.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def half_width(standard_error: float, freedom: int) -> float:
    """Half the width of the interval; infinite without a degree of freedom.

    Beyond the table the last quantile is taken, which makes the interval a little too wide.

    >>> half_width(0.5, 2), half_width(0.5, 0), half_width(1.0, 99)
    (2.1515, inf, 2.262)
    """
    return QUANTILES[min(freedom, len(QUANTILES)) - 1] * standard_error if freedom > 0 else math.inf
