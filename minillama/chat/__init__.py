"""Dialogues, in reading order: dialog, conversation, terminal; jsonl, sft, gatt, which train."""

# ruff: noqa: I001  (reading order)
from minillama.chat.dialog import FORMATS, ChatFormat, DialogTokens, Message, encode_dialog
from minillama.chat.dialog import fit, neutralise, recognise
from minillama.chat.conversation import Conversation

__all__ = [
    "FORMATS",
    "ChatFormat",
    "Conversation",
    "DialogTokens",
    "Message",
    "encode_dialog",
    "fit",
    "neutralise",
    "recognise",
]
