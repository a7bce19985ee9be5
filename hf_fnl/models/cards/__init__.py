"""Model cards for the Hub, written from a model and from what lies beside it."""

from hf_fnl.models.cards.card import CARD_FILE, is_automatic, model_card, stated_in, write_card, write_upload_card
from hf_fnl.models.cards.record import Record
from hf_fnl.models.cards.upload import UploadsCard

__all__ = [
    "CARD_FILE",
    "Record",
    "UploadsCard",
    "is_automatic",
    "model_card",
    "stated_in",
    "write_card",
    "write_upload_card",
]
