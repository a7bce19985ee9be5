"""Unstructured pruning in place, and the criteria that choose what stays."""

from hf_fnl.vision.pruning.counts import smart_counts, sparsity, weights_to_keep
from hf_fnl.vision.pruning.masks import METHODS, PruningResult, apply_masks_, choose_masks, finalize_, prune_
from hf_fnl.vision.pruning.scores import grasp_scores, magnitude_scores, snip_scores

__all__ = [
    "METHODS",
    "PruningResult",
    "apply_masks_",
    "choose_masks",
    "finalize_",
    "grasp_scores",
    "magnitude_scores",
    "prune_",
    "smart_counts",
    "snip_scores",
    "sparsity",
    "weights_to_keep",
]
