"""Formulas of factorized weights, as pure functions of tensors."""
