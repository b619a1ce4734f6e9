"""Burn rate and runway, in integers."""

from typing import Final

from spendfuse.engine.spend import Spend
from spendfuse.engine.windows import HOUR_US, SECOND_US, calendar_window

BURN_MIN_US: Final = 60 * SECOND_US
"""A scope younger than a minute is taken as a minute old: a first call is not a rate."""


def burn_per_hour(spend: Spend, zone: str, now_us: int, index: int) -> int:
    """Return what the last hour cost: the running hour, and the share of the hour before that still counts.

    `index` chooses nano-units or tokens; a scope younger than an hour is scaled up to one.
    """
    running = calendar_window("hour", zone, now_us)
    before = calendar_window("hour", zone, running.start_us - 1)
    elapsed_us = now_us - running.start_us
    spent = spend.in_window(running.key)[index]
    spent += spend.in_window(before.key)[index] * (HOUR_US - elapsed_us) // HOUR_US
    age_us = min(HOUR_US, max(BURN_MIN_US, now_us - spend.first_us)) if spend.first_us else HOUR_US
    return spent * HOUR_US // age_us


def runway_s(left: int, burn: int) -> int | None:
    """Return the seconds until `left` is spent at `burn` an hour; None when nothing burns."""
    if burn <= 0:
        return None
    return max(left, 0) * 3_600 // burn
