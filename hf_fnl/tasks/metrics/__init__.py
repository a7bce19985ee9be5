"""Scoring rules of the tasks; ``evaluate.load`` takes the folder ``squad_em_f1``."""
