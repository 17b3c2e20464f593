"""Masks, criteria, exact quantile and rewinding: pure functions over named tensors."""
