"""All themes on one GPU, in pieces."""
