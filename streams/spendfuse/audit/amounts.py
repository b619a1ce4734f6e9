"""Amounts as text: exact decimals of nano-units, and cents that add up to their total. Integers only."""

from collections.abc import Mapping, Sequence
from typing import Final

NANO_DIGITS: Final = 9
_MINOR_DIGITS: Final[Mapping[str, int]] = {
    "BIF": 0, "CLP": 0, "DJF": 0, "GNF": 0, "ISK": 0, "JPY": 0, "KMF": 0, "KRW": 0, "PYG": 0, "RWF": 0, "UGX": 0,
    "UYI": 0, "VND": 0, "VUV": 0, "XAF": 0, "XOF": 0, "XPF": 0,
    "BHD": 3, "IQD": 3, "JOD": 3, "KWD": 3, "LYD": 3, "OMR": 3, "TND": 3,
}  # fmt: skip
"""Decimals of a currency's minor unit where they are not 2 (ISO 4217, list one)."""


def minor_digits(currency: str) -> int:
    """Return how many decimals an amount of a currency has on an invoice."""
    return _MINOR_DIGITS.get(currency, 2)


def decimal_text(value: int, digits: int) -> str:
    """Return an integer of 10^-digits units as a decimal with exactly that many decimals."""
    sign, whole = "-" if value < 0 else "", abs(value)
    if not digits:
        return f"{sign}{whole}"
    scale = 10**digits
    return f"{sign}{whole // scale}.{whole % scale:0{digits}d}"


def exact(nanos: int) -> str:
    """Return nano-units as a decimal with all nine decimals."""
    return decimal_text(nanos, NANO_DIGITS)


def apportion(nanos: Sequence[int], digits: int) -> list[int]:
    """Return each amount in minor units (10^-digits), so that they add up to the rounded total.

    The total is rounded half up; what is left over after rounding every amount down goes to the largest remainders
    (Hamilton's method), the earlier of two equal ones first. Each result is off by less than one minor unit.
    """
    step = int(10 ** (NANO_DIGITS - digits))
    parts = [divmod(value, step) for value in nanos]
    left = (sum(nanos) + step // 2) // step - sum(whole for whole, _ in parts)
    favoured = sorted(range(len(parts)), key=lambda nth: (-parts[nth][1], nth))[:left]
    rounded = [whole for whole, _ in parts]
    for nth in favoured:
        rounded[nth] += 1
    return rounded
