"""Parts of a model: its encoder, its decoder, and the cross-attentions between them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

# The attributes by which the layers of Transformers and of torch hold their cross-attentions.
_CROSS_ATTENTIONS = frozenset(
    {
        "EncDecAttention",  # T5
        "cross_attention",  # NLLB-MoE, Dia
        "cross_attn",  # ProphetNet, Mllama, Mask2Former
        "cross_attn_image",  # SAM 2 on video
        "cross_attn_image_to_token",  # SAM
        "cross_attn_token_to_image",
        "crossattention",  # BERT, GPT-2 and those after them
        "encoder_attn",  # BART, Marian, Whisper, DETR
        "encoder_attn_text",  # Grounding DINO
        "encoder_decoder_attention",  # Pix2Struct
        "multihead_attn",  # torch.nn.TransformerDecoderLayer
    }
)


def parts_of(model: nn.Module) -> dict[str, str | None]:
    """Map the name of each module to the part of the model that it belongs to, or to ``None``."""
    stacks = {stack: part for module in model.modules() for stack, part in _stacks(module).items()}
    parts: dict[str, str | None] = {}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        parts[path] = "cross" if name in _CROSS_ATTENTIONS else stacks.get(module, parts.get(parent))
    return parts


def _stacks(model: nn.Module) -> dict[nn.Module, str]:
    """The encoder and the decoder, if a model has both."""
    if isinstance(model, nn.Transformer):
        encoder, decoder = model.encoder, model.decoder
    elif isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder:
        encoder, decoder = model.get_encoder(), model.get_decoder()
    else:
        return {}
    # Asked for a part that it does not have, a Transformers model gives itself.
    return {} if model in (encoder, decoder) else {encoder: "encoder", decoder: "decoder"}
