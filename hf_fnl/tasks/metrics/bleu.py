"""BLEU by sacrebleu: on detokenized text, comparable between systems, and on tokens, as older papers report it."""

from __future__ import annotations

from collections.abc import Sequence

from hf_fnl.utils.extras import require


def bleu_scores(
    hypotheses: Sequence[str], references: Sequence[str], *, lang: str = "", detokenize_lang: str | None = None
) -> dict[str, float | str]:
    """Score translations against one reference each.

    Args:
        hypotheses: Translations, as a model gives them.
        references: What they should be, in the same order and form.
        lang: Language of both; ``"zh"``, ``"ja"`` and ``"ko"`` have rules of their own in sacrebleu.
        detokenize_lang: Language whose Moses tokenization both are in (``"en"``), to be undone for ``bleu``; ``None``
            if they are ordinary text.

    Returns:
        ``bleu`` of detokenized text under sacrebleu's own tokenization (13a, or that of the language), and
        ``tokenized_bleu`` of the words between the spaces as they stand (Khodak et al. 2021), in percent;
        ``bleu_signature`` and ``tokenized_bleu_signature`` say how each was counted.

    Raises:
        ValueError: If the numbers of texts differ or are zero.
    """
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"as many translations as references are needed, got {len(hypotheses)} and {len(references)}")
    sacrebleu = require("sacrebleu.metrics", "BLEU is computed by", "hf_fnl[tasks]")
    plain = [detokenize(texts, detokenize_lang) if detokenize_lang else texts for texts in (hypotheses, references)]
    # `force`: sacrebleu warns of tokenized text, which is what is meant here.
    scorers = {
        "bleu": (sacrebleu.BLEU(trg_lang=lang), plain),
        "tokenized_bleu": (sacrebleu.BLEU(tokenize="none", force=True), [hypotheses, references]),
    }
    scores: dict[str, float | str] = {}
    for name, (scorer, (found, wanted)) in scorers.items():
        scores[name] = scorer.corpus_score(list(found), [list(wanted)]).score
        scores[f"{name}_signature"] = str(scorer.get_signature())
    return scores


def detokenize(texts: Sequence[str], lang: str) -> list[str]:
    """Undo the Moses tokenization of texts in a language, escapes such as ``&apos;`` included."""
    moses = require("sacremoses", "Moses tokenization is undone by", "hf_fnl[tasks]").MosesDetokenizer(lang=lang)
    return [moses.detokenize(text.split()) for text in texts]
