"""The experiments with convolutions: models, data, training, overcomplete layers, pruning."""
