"""Chat templates: conversations to pieces of text and control tokens, with what is learned."""

from lamina.data.chat.pieces import ChatTemplate, Mask, Piece

__all__ = ["ChatTemplate", "Mask", "Piece"]
