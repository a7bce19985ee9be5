"""Trainings of the grids: plain PyTorch loops whose steps a GPU repeats as CUDA graphs."""
