"""The one config path: dataclass defaults, `base:` chain, recipe, overrides, checks, frozen. Imports no torch."""
