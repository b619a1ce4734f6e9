"""The values of a budget file, from text: amounts, fractions, windows, lengths of time, scopes, time zones.

Each function takes one value's text and returns what the wire model holds, or raises `BadValueError` with what is
wrong and what to write instead.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final
from zoneinfo import available_timezones

from spendfuse.adapters.yaml_nodes import BadValueError, did_you_mean, shown
from spendfuse.wire.base import ID_PATTERN, MODEL_PATTERN, NAME_PATTERN, NANOS_MAX
from spendfuse.wire.budget import BASIS_POINTS, GRACE_S_MAX, ROLLING_S_MAX, ROLLING_S_MIN, WindowSpec

OUTPUT_TOKENS_MAX: Final = 1_000_000
SHOWN_SCOPE_MAX: Final = 200
AMOUNT_CHARS_MAX: Final = 40
NANO_DIGITS: Final = 9
LINE_CHARS_MAX: Final = 512
WINDOW_WORDS: Final = ("run", "hour", "day", "week", "month", "rolling")
WINDOW_SYNONYMS: Final = {
    "hourly": "hour",
    "1h": "hour",
    "daily": "day",
    "weekly": "week",
    "monthly": "month",
    "24h": "rolling 24h (the last 24 hours) or day (the calendar day)",
    "session": "run",
}
FLAGS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
UNITS_S: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
MULTIPLES: Final = {"": 0, "k": 3, "M": 6, "B": 9}
SEGMENTS: Final = {
    "workspace": "workspace:acme",
    "team": "team:acme/research",
    "agent": "agent:acme/research/planner",
    "run": "run:acme/run-17",
}
_AMOUNT: Final = re.compile(r"([0-9][0-9_]*)(?:\.([0-9]+))?\s*([A-Za-z]?)\s+([A-Za-z]+)")
_AMOUNT_TIGHT: Final = re.compile(r"([0-9][0-9_.]*[kMB]?)([A-Za-z]{3,})")
_PER_CENT: Final = re.compile(r"([0-9]{1,9})(?:\.([0-9]{1,2})0*)?\s*%")
_DURATION: Final = re.compile(r"([0-9]{1,9})\s*([smhd])")
_SEGMENT: Final = re.compile(r"[A-Za-z0-9._+*?-]{1,64}")
_RUN_SEGMENT: Final = re.compile(r"[A-Za-z0-9._:/@#+*?-]{1,128}")


def amount(text: str, currency: str) -> tuple[int, str]:
    """Return amount and unit of `50 USD`, `0.25 USD`, `5M tokens`, `1_000_000 tokens`; exact.

    Raises `BadValueError`.
    """
    match = _AMOUNT.fullmatch(text) if len(text) <= AMOUNT_CHARS_MAX else None
    if match is None:
        raise _not_an_amount(text, currency)
    whole, fraction, multiple, unit = match[1].replace("_", ""), match[2] or "", match[3], match[4]
    if multiple not in MULTIPLES:
        raise BadValueError(
            f"the multiple {multiple!r} of {shown(text)} is unknown", "k is thousand, M million, B (American) billion"
        )
    digits = MULTIPLES[multiple]
    if unit != "tokens":
        _check_currency(unit, currency)
        digits += NANO_DIGITS
    fraction = fraction.rstrip("0")
    if len(fraction) > digits:
        smallest = "a whole token" if unit == "tokens" else f"0.000000001 {currency}"
        raise BadValueError(f"{shown(text)} is finer than {smallest}", f"write fewer decimals, at most {digits}")
    value = int(whole + fraction) * 10 ** (digits - len(fraction))
    wire_unit = "tokens" if unit == "tokens" else f"nano-{currency}"
    if value == 0:
        raise BadValueError("the amount is zero: everything would be halted at once", "write an amount above zero")
    if value > NANOS_MAX:
        raise BadValueError(f"{shown(text)} is too large", f"write at most {amount_text(NANOS_MAX, wire_unit)}")
    return value, wire_unit


def _not_an_amount(text: str, currency: str) -> BadValueError:
    if "," in text:
        return BadValueError(f"{shown(text)} has a comma", "write 1000.50 USD or 1_000 USD")
    if text.startswith(("$", "€", "£")):
        return BadValueError(f"{shown(text)} has a currency sign", f"write {text[1:].strip()[:20]} {currency}")
    tight = _AMOUNT_TIGHT.fullmatch(text)
    if tight:
        return BadValueError(f"{shown(text)} has no space before its unit", f"write {tight[1]} {tight[2]}")
    if re.fullmatch(r"[0-9][0-9_.]*[kMB]?", text):
        return BadValueError(f"{shown(text)} has no unit", f"write {text} {currency} or {text} tokens")
    return BadValueError(f"{shown(text)} is not an amount", "write such as 50 USD, 0.25 USD or 5M tokens")


def _check_currency(unit: str, currency: str) -> None:
    if unit == currency:
        return
    if unit.lower() in ("token", "tokens", "tok", "toks"):
        raise BadValueError(f"the unit {unit!r} is unknown", "write tokens")
    if unit.upper() == currency:
        raise BadValueError(f"the unit {unit!r} is unknown", f"write {currency}")
    raise BadValueError(
        f"the amount is in {shown(unit)}, but the price book is in {currency}: nothing is converted",
        f"write the amount in {currency}, or in tokens",
    )


def fraction(text: str) -> int:
    """Return `80%` as 1/10,000 of a cap. Raises `BadValueError`."""
    match = _PER_CENT.fullmatch(text)
    if match is None:
        plain = re.fullmatch(r"0?\.([0-9]{1,2})", text)
        number = re.fullmatch(r"[0-9]{1,3}", text)
        guess = f"{int(plain[1].ljust(2, '0'))}%" if plain else f"{text}%" if number else "80%"
        raise BadValueError(f"{shown(text)} is not per cent of the cap", f"write {guess}")
    value = int(match[1]) * 100 + int((match[2] or "").ljust(2, "0"))
    if not 1 <= value <= BASIS_POINTS:
        raise BadValueError(f"{shown(text)} is not between 0.01% and 100%", "the cap itself is 100%")
    return value


def window(text: str) -> WindowSpec:
    """Return `day`, `rolling 90m` and so on. Raises `BadValueError`."""
    word, _, length = text.partition(" ")
    if text in ("run", "hour", "day", "week", "month"):
        return WindowSpec.model_validate({"kind": text})
    if word == "rolling":
        match = _DURATION.fullmatch(length.strip())
        if match is None:
            raise BadValueError(f"{shown(text)} has no length", "write such as rolling 30m or rolling 24h")
        seconds = int(match[1]) * UNITS_S[match[2]]
        if not ROLLING_S_MIN <= seconds <= ROLLING_S_MAX or seconds % 60:
            raise BadValueError(
                f"{shown(text)} is not between 5m and 24h in whole minutes",
                f"write rolling {_nearest_rolling(seconds)}",
            )
        return WindowSpec(kind="rolling", rolling_s=seconds)
    if text.lower() in WINDOW_SYNONYMS:
        raise BadValueError(f"the window {shown(text)} is unknown", f"write {WINDOW_SYNONYMS[text.lower()]}")
    if _DURATION.fullmatch(text):
        raise BadValueError(f"the window {shown(text)} is unknown", f"write rolling {text}")
    raise BadValueError(f"the window {shown(text)} is unknown", did_you_mean(text, WINDOW_WORDS))


def _nearest_rolling(seconds: int) -> str:
    near = min(max(seconds // 60 * 60, ROLLING_S_MIN), ROLLING_S_MAX)
    return f"{near // 3_600}h" if near % 3_600 == 0 else f"{near // 60}m"


def duration_s(text: str) -> int:
    """Return `1h`, `30m`, `2d` or `0` in seconds. Raises `BadValueError`."""
    match = _DURATION.fullmatch(text)
    if match is None and text != "0":
        guess = f"{text}m or {text}h" if text.isascii() and text.isdigit() else "such as 1h or 30m"
        raise BadValueError(f"{shown(text)} is not a length of time", f"write {guess}")
    seconds = int(match[1]) * UNITS_S[match[2]] if match else 0
    if seconds > GRACE_S_MAX:
        raise BadValueError(f"{shown(text)} is longer than {GRACE_S_MAX // 86_400} days", "write at most 7d")
    return seconds


def scope_pattern(text: str) -> str:
    """Return a scope or a pattern of scopes. Raises `BadValueError` that says how the segments are counted."""
    kind, colon, path = text.partition(":")
    if kind not in SEGMENTS or not colon:
        instead = did_you_mean(kind, tuple(SEGMENTS)) if colon else "write such as agent:acme/research/*"
        raise BadValueError(f"{shown(text)} does not start with workspace:, team:, agent: or run:", instead)
    wanted = SEGMENTS[kind].count("/") + 1
    segments = path.split("/", 1) if kind == "run" else path.split("/")
    if "**" in path:
        raise BadValueError(f"** in {shown(text)}: a * stays inside its segment", f"write {_padded(kind, segments)}")
    if len(segments) != wanted:
        raise BadValueError(
            f"{shown(text)} has {len(segments)} segment{'s' if len(segments) > 1 else ''}, a scope {kind} has {wanted}"
            f" ({SEGMENTS[kind]}); a * stays inside its segment",
            f"write {_padded(kind, segments)}",
        )
    for position, segment in enumerate(segments):
        allowed = _RUN_SEGMENT if kind == "run" and position == 1 else _SEGMENT
        if not allowed.fullmatch(segment):
            raise BadValueError(
                f"the segment {shown(segment)} of {shown(text)} matches no name",
                "write letters, digits, . _ + - and for patterns * and ?",
            )
    return text


def _padded(kind: str, segments: Sequence[str]) -> str:
    wanted = SEGMENTS[kind].count("/") + 1
    parts = [segment.replace("**", "*") or "*" for segment in segments][:wanted]
    return f"{kind}:{'/'.join((parts + ['*'] * wanted)[:wanted])}"[:SHOWN_SCOPE_MAX]


@lru_cache(maxsize=1)
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())


def timezone(text: str) -> str:
    """Return an IANA time zone's name. Raises `BadValueError` with a near one."""
    if text in _zones():
        return text
    tail = text.rpartition("/")[2].replace(" ", "_").lower()
    same_city = sorted(zone for zone in _zones() if zone.rpartition("/")[2].lower() == tail and "/" in zone)
    instead = f"write {same_city[0]}" if same_city else did_you_mean_zone(text)
    raise BadValueError(f"the time zone {shown(text)} is unknown", instead)


def did_you_mean_zone(text: str) -> str:
    """Return `write X` for the nearest IANA name."""
    by_lower = {zone.lower(): zone for zone in _zones()}
    near = did_you_mean(text, tuple(by_lower))
    found = by_lower.get(near.removeprefix("write "))
    return f"write {found}" if found else "write an IANA name such as Europe/Amsterdam"


def flag(text: str) -> bool:
    """Return `true` or `false`. Raises `BadValueError`."""
    if text.lower() not in FLAGS:
        raise BadValueError(f"{shown(text)} is neither true nor false", "write true or false")
    return FLAGS[text.lower()]


def unknown_model(text: str) -> str:
    """Return `ceiling`, `deny` or `warn`. Raises `BadValueError`."""
    known = ("ceiling", "deny", "warn")
    if text not in known:
        raise BadValueError(f"{shown(text)} is unknown", did_you_mean(text, known))
    return text


def _matching(pattern: str, what: str) -> Callable[[str], str]:
    compiled = re.compile(pattern.removesuffix("$") + r"\Z")

    def check(text: str) -> str:
        if not compiled.match(text):
            raise BadValueError(f"{shown(text)} is not {what}", "write letters, digits, . _ + - only")
        return text

    return check


name: Final = _matching(NAME_PATTERN, "a name of 1 to 64 characters")
model: Final = _matching(MODEL_PATTERN, "a model's name")
model_in_use: Final = _matching(ID_PATTERN, "a model's name")


def note(text: str) -> str:
    """Return a note of one line. Raises `BadValueError`."""
    if len(text) > LINE_CHARS_MAX or not text.isprintable():
        raise BadValueError("the note is not one line of at most 512 characters", "shorten it")
    return text


def output_tokens(text: str) -> int:
    """Return a number of tokens such as `512`. Raises `BadValueError`."""
    plain = text.replace("_", "")
    if not (plain.isascii() and plain.isdigit() and len(plain) <= len(str(OUTPUT_TOKENS_MAX))):
        raise BadValueError(f"{shown(text)} is not a number of tokens", "write such as 512")
    if not 1 <= int(plain) <= OUTPUT_TOKENS_MAX:
        raise BadValueError(f"{shown(text)} is not between 1 and {OUTPUT_TOKENS_MAX}", "write such as 512")
    return int(plain)


def amount_text(amount: int, unit: str) -> str:
    """Return an amount as a budget file writes it: `0.25 USD`, `5000000 tokens`."""
    if unit == "tokens":
        return f"{amount} tokens"
    whole, rest = divmod(amount, 10**NANO_DIGITS)
    fraction = f"{rest:0{NANO_DIGITS}d}".rstrip("0")
    return f"{whole}{'.' + fraction if fraction else ''} {unit.removeprefix('nano-')}"


def per_cent(fraction: int) -> str:
    """Return 1/10,000 of a cap as per cent: `80%`, `99.5%`."""
    whole, rest = divmod(fraction, 100)
    return f"{whole}{'.' + f'{rest:02d}'.rstrip('0') if rest else ''}%"
