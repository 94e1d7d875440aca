"""Numbers as people write them: k M B T are powers of 1000, Ki Mi Gi Ti powers of 1024."""

from __future__ import annotations

import re

_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_COUNT = re.compile(r"([+-]?\d[\d_,]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(Ki|Mi|Gi|Ti|k|M|B|T)?")


def parse_count(text: str) -> int:
    """Read `32k`, `1.5M`, `64Ki`, `524_288` or `1e6` as an integer.

    Raises:
        ValueError: If the text is not a count or does not denote a whole number.
    """
    match = _COUNT.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a count (examples: 4096, 32k, 1.5M, 64Ki)")
    number = float(match[1].replace("_", "").replace(",", ""))
    value = number * (_DECIMAL | _BINARY)[match[2] or ""]
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def format_count(value: float) -> str:
    """Write a count with three significant digits and a decimal suffix: `4.13M`."""
    for suffix in ("T", "B", "M", "k"):
        scale = _DECIMAL[suffix]
        if abs(value) >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def format_bytes(value: float) -> str:
    """Write bytes in binary units: `41.2GiB`."""
    for suffix in ("Ti", "Gi", "Mi", "Ki"):
        if abs(value) >= _BINARY[suffix]:
            return f"{value / _BINARY[suffix]:.1f}{suffix}B"
    return f"{value:.0f}B"


def plural(count: int, noun: str) -> str:
    """Write a count with its noun, of which the plural ends in s: `1 file`, `2,048 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """Write seconds as `3h12m`, `4m05s` or `12s`."""
    total = max(0, int(seconds))
    hours, minutes, rest = total // 3600, total % 3600 // 60, total % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
