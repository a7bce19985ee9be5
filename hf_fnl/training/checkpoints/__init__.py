"""Checkpoints that appear whole or not at all, and that every engine and any number of processes can go on from."""
