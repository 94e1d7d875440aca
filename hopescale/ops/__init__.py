"""Operations on tensors. Knows no module, no config and no process group."""
