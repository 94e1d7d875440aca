"""What the losses and scores of a table measure, by the columns beside them that say so, as `loss_from`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

FROM = "_from"
"""What ends the name of a column that says what the column of the same name measures."""


def origins(
    column: str, header: Sequence[str], rows: Sequence[tuple[int, Sequence[str]]], wanted: Collection[int]
) -> dict[str, list[int]]:
    """Return what a column measures in the wanted rows, with their numbers; nothing where no column says it.

    Means of training losses are one measure, whatever number of steps they are of.
    """
    found: dict[str, list[int]] = {}
    if (name := f"{column}{FROM}") in header:
        place = list(header).index(name)
        for number, row in rows:
            if number in wanted and (text := row[place].strip()):
                found.setdefault("train" if text.startswith("train") else text, []).append(number)
    return found


def named(found: Mapping[str, Sequence[int]]) -> str:
    """Name several measures, with the first row of each."""
    return " and ".join(f"{name} (row {rows[0]})" for name, rows in found.items())
