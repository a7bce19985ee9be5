"""Slow, readable oracles: one whole tensor after the other, nothing clever."""
