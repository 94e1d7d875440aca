"""Operations on tensors. Knows no module, no config and no process group."""

from hopescale.ops.delta_rule import DeltaRuleOutput, delta_rule

__all__ = ["DeltaRuleOutput", "delta_rule"]
