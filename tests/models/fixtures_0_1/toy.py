"""A model of plain torch, the same for version 0.1, which wrote its factors, and for the test that reads them."""

from collections import OrderedDict

from torch import nn


def toy() -> nn.Sequential:
    """Return a network from ids ``(batch, length)`` to scores ``(batch, length, 11)``; its head is its embedding."""
    layers = {"embedding": nn.Embedding(11, 7), "up": nn.Linear(7, 9), "act": nn.ReLU(), "down": nn.Linear(9, 7)}
    model = nn.Sequential(OrderedDict(layers, head=nn.Linear(7, 11)))
    model.head.weight = model.embedding.weight
    return model
