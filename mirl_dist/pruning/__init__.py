"""Masks, the exact quantile, criteria, rewinding: pure functions over named tensors."""
