"""95 % intervals, as (low, high).

Of one evaluation: for means over images, whose spread the images themselves show. Of several evaluations with seeds of
their own: for any metric, and for FID, KID, precision and recall only so. A bootstrap over images does not do for
these: a sample drawn with replacement has fewer different images, which by itself moves them (FID upwards).
"""

import math

import torch

from sidfast.common.extras import need

LEVEL = 0.95
_Z = 1.959963984540054                                   # quantile of the normal distribution, at (1 + LEVEL) / 2


def of_mean(values):
    """Normal interval of the mean of independent values [N]; None for fewer than two."""
    if len(values) < 2:
        return None
    values = torch.as_tensor(values).double()
    half = _Z * values.std().item() / math.sqrt(len(values))
    return values.mean().item() - half, values.mean().item() + half


def of_share(flags):
    """Wilson's interval of the share of true flags [N]: it has a width where all or none are true."""
    n, share = len(flags), int(flags.sum()) / len(flags)
    center = share + _Z**2 / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, (center - half) / (1 + _Z**2 / n)), min(1.0, (center + half) / (1 + _Z**2 / n))


def of_repeats(values, share=False):
    """(mean, (low, high)) of a few independent values by Student's t; the interval is None for fewer than two.

    `share`: the values are shares of a whole, and the interval stays between 0 and 1.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = need("scipy.stats", "eval", "an interval over seeds").t.ppf(0.5 + LEVEL / 2, len(values) - 1) * (
        deviation / math.sqrt(len(values)))
    interval = mean - half, mean + half
    return mean, clipped(interval) if share else interval


def clipped(interval):
    """The part of an interval of a share that is possible: between 0 and 1."""
    return tuple(min(1.0, max(0.0, end)) for end in interval)
