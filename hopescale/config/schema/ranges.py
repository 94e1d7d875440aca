"""Types of the numbers in a config that say their range: `steps: Count`, `phase: CountOrZero`, ..."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class NumberRange:
    """The range of a number, written as `[1, inf)` or `(0, 2]`: a round bracket leaves its end out.

    `str` says it in words: `at least 1`, `above 0`, `in (0, 2]`.
    """

    text: str

    def __contains__(self, value: float) -> bool:
        low, high = (float(end) for end in self.text[1:-1].split(","))
        above = value > low if self.text[0] == "(" else value >= low
        below = value < high if self.text[-1] == ")" else value <= high
        return above and below

    def __str__(self) -> str:
        low, high = self.text[1:-1].split(", ")
        if high != "inf":
            return f"in {self.text}"
        return f"above {low}" if self.text[0] == "(" else f"at least {low}"


Count = Annotated[int, NumberRange("[1, inf)")]
CountOrAuto = Count | Literal["auto"]
CountOrZero = Annotated[int, NumberRange("[0, inf)")]
Seed = Annotated[int, NumberRange("[0, 4294967295]")]
Positive = Annotated[float, NumberRange("(0, inf)")]
PositiveOrZero = Annotated[float, NumberRange("[0, inf)")]
Fraction = Annotated[float, NumberRange("(0, 1)")]
FractionOrZero = Annotated[float, NumberRange("[0, 1)")]
FractionOrEnds = Annotated[float, NumberRange("[0, 1]")]
