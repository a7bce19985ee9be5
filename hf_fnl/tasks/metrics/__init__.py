"""Scoring rules, and the ``evaluate`` modules built on them: ``evaluate.load`` takes the folders here."""

from hf_fnl.tasks.metrics.squad_scores import exact_match_score, f1_score, score_squad

__all__ = ["exact_match_score", "f1_score", "score_squad"]
