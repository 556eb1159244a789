"""Pieces of text to token ids, through whichever tokenizer a model comes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["PieceEncoder"]


class PieceEncoder:
    """Encodes the pieces of a rendered conversation.

    A sentencepiece tokenizer puts a space before any text it is given, which would be wrong in the
    middle of a conversation. `follow` therefore encodes a piece as the continuation of other text.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        if self._fast is not None and (self._fast.truncation or self._fast.padding):
            # Settings of the caller's, which would cut or pad every piece.
            self._fast = type(self._fast).from_str(self._fast.to_str())
            self._fast.no_truncation()
            self._fast.no_padding()
        self._newline = self.start(["\n"])[0]
        joined = self.start(["\na"])[0]
        self._adds_prefix = joined[len(self._newline) :] != self.start(["a"])[0]

    def start(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as if it stood at the beginning. Special tokens written in a text
        are recognized; none are added."""
        if self._fast is not None:
            encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        return [list(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts]

    def follow(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as if it stood after other text."""
        if not self._adds_prefix:
            return self.start(texts)
        newline = self._newline
        pieces = self.start(["\n" + text for text in texts])
        odd = [k for k, ids in enumerate(pieces) if ids[: len(newline)] != newline]
        # A newline that merged with the text: then the text starts with no space of its own either.
        for k, ids in zip(odd, self.start([texts[k] for k in odd]), strict=True):
            pieces[k] = newline + ids
        return [ids[len(newline) :] for ids in pieces]
