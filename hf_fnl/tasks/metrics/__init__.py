"""Scoring rules, and the ``evaluate`` modules built on them: each folder here loads with ``evaluate.load(folder)``."""

from hf_fnl.tasks.metrics.squad_scores import exact_match_score, f1_score, score_squad

__all__ = ["exact_match_score", "f1_score", "score_squad"]
