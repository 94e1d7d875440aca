"""Numbers that YAML 1.1 takes for others than people do."""

from __future__ import annotations

import re

import yaml

from hopescale.common.errors import ConfigError

_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_SEXAGESIMAL = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?")


def refuse_odd_numbers(text: str) -> None:
    """Refuse a YAML text with a plain `010`, which would be 8, or `1:30`, which would be 90.

    Raises:
        ConfigError: With the number, and how to write it.
        yaml.YAMLError: If the text is not YAML.
    """
    for token in yaml.scan(text):
        if not isinstance(token, yaml.ScalarToken) or not token.plain:
            continue
        written = token.value
        if _OCTAL.fullmatch(written):
            octal, decimal = int(written.replace("_", ""), 8), int(written.replace("_", ""))
            raise ConfigError(
                f"{written} is {octal} to YAML, as a number that begins with 0",
                f'write {decimal} or {octal}, or "{written}" for a text',
            )
        if _SEXAGESIMAL.fullmatch(written) and not isinstance(number := yaml.safe_load(written), str):
            raise ConfigError(
                f"{written} is {number} to YAML, as a number of base 60", f'write {number}, or "{written}" for a text'
            )
