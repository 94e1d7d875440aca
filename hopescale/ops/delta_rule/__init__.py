"""The gated delta rule: with momentum, under every memory of Hope, and with decay before the erase. See README.md."""

from hopescale.ops.delta_rule.chunked import delta_rule
from hopescale.ops.delta_rule.gated import gated_delta_rule
from hopescale.ops.delta_rule.naive import delta_rule_naive, gated_delta_rule_naive
from hopescale.ops.delta_rule.types import DeltaRuleOutput, Read

__all__ = ["DeltaRuleOutput", "Read", "delta_rule", "delta_rule_naive", "gated_delta_rule", "gated_delta_rule_naive"]
