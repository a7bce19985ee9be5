"""Selectors: which kinds of products are meant, everywhere or in one part of a model."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("linear", "embedding", "conv", "qk", "ov", "tensor")
ATTENTION_KINDS = ("qk", "ov")
PARTS = ("encoder", "decoder", "cross")


@dataclass(frozen=True)
class Selector:
    """A kind of product, everywhere or in one part of a model; written ``"ov"`` or ``"ov:encoder"``.

    Args:
        kind: One of ``KINDS``.
        part: ``"cross"`` is what a cross-attention holds, ``"decoder"`` the rest of the decoder, ``"encoder"`` the
            encoder; the last two are told apart in encoder-decoder models only. ``None`` means all products of the
            kind, those that belong to no part, as an embedding that encoder and decoder share, included.
    """

    kind: str
    part: str | None = None

    @classmethod
    def parse(cls, text: str, option: str = "a selector") -> Selector:
        """The selector that ``text`` writes; a ``ValueError`` about ``option`` if there is no such kind or part."""
        kind, *parts = text.split(":")
        if kind not in KINDS or len(parts) > 1 or not set(parts) <= set(PARTS):
            raise ValueError(
                f"{option} must be any of {', '.join(KINDS)}, each alone or with one of the parts {', '.join(PARTS)}, "
                f"as in 'ov:encoder'; got {text!r}"
            )
        return cls(kind, *parts)

    def matches(self, kind: str, part: str | None) -> bool:
        """Whether a product of this kind in this part is meant."""
        return self.kind == kind and self.part in (None, part)

    def __str__(self) -> str:
        return self.kind if self.part is None else f"{self.kind}:{self.part}"
