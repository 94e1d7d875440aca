"""The gated delta rule with momentum: the one recurrence under every memory of the model. See README.md."""

from hopescale.ops.delta_rule.chunked import delta_rule
from hopescale.ops.delta_rule.naive import delta_rule_naive
from hopescale.ops.delta_rule.types import DeltaRuleOutput, Read

__all__ = ["DeltaRuleOutput", "Read", "delta_rule", "delta_rule_naive"]
