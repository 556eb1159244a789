"""Pieces of text to token ids, through whichever tokenizer a model comes with."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import chain, islice
from typing import Any, TypeVar

from lamina.data.chat.pieces import Piece
from lamina.data.parallel import cores

__all__ = ["PieceEncoder"]

T = TypeVar("T")

#: The ids of each piece of a sample.
Ids = list[list[int]]


class PieceEncoder:
    """Encodes the pieces of samples.

    A sentencepiece tokenizer puts a space before any text it is given, which is wrong in the middle
    of a rendered conversation: `follow` encodes a text as the continuation of another.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        if self._fast is not None and (self._fast.truncation or self._fast.padding):
            # Settings of the caller's, which would cut or pad every piece.
            self._fast = _copy(self._fast)
        self._newline = self.start(["\n"])[0]
        joined = self.start(["\na"])[0]
        self._adds_prefix = joined[len(self._newline) :] != self.start(["a"])[0]

    def encode_all(
        self, batches: Iterable[tuple[T, Sequence[Sequence[Piece]]]]
    ) -> Iterator[tuple[T, list[Ids]]]:
        """Batches of samples, encoded, each with what came with it. A tokenizer that isn't written
        in Python encodes several at a time, while the caller makes the next ones."""
        source = iter(batches)
        first = list(islice(source, 2))
        if len(first) < 2 or self._fast is None:
            for key, samples in chain(first, source):
                yield key, self.encode(samples)
            return
        count = cores()
        waiting: deque[tuple[T, Future[list[Ids]]]] = deque()
        with ThreadPoolExecutor(count) as pool:
            for key, samples in chain(first, source):
                waiting.append((key, pool.submit(self.encode, samples)))
                if len(waiting) > count:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()

    def encode(self, samples: Sequence[Sequence[Piece]]) -> list[Ids]:
        """For each sample, the ids of each of its pieces."""
        first: list[str] = []
        rest: list[str] = []
        plain: list[str] = []
        for pieces in samples:
            for k, piece in enumerate(pieces):
                if piece.kind == "plain":
                    plain.append(piece.text)
                elif piece.kind == "rendered":
                    (rest if k else first).append(piece.text)
        encoded = {
            "first": iter(self.start(first)),
            "rest": iter(self.follow(rest)),
            "plain": iter(self.plain(plain)),
        }
        return [
            [
                list(piece.ids)
                if piece.kind == "ids"
                else next(encoded["plain" if piece.kind == "plain" else "rest" if k else "first"])
                for k, piece in enumerate(pieces)
            ]
            for pieces in samples
        ]

    def start(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as if it stood at the beginning. Special tokens written in a text
        are recognized; none are added."""
        if self._fast is not None:
            return _encode(self._fast, texts)
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

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text by itself, as the vendors' encoders see it: special tokens written
        in it are text, and sentencepiece's leading space is always added."""
        if self._swallows_space:
            texts = [" " + text if text else text for text in texts]
        if self._plain is not None:
            return _encode(self._plain, texts)
        return [
            list(self._tokenizer.encode(t, add_special_tokens=False, split_special_tokens=True))
            for t in texts
        ]

    @cached_property
    def _plain(self) -> Any:
        if self._fast is None:
            return None
        plain = _copy(self._fast)
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _swallows_space(self) -> bool:
        """Whether a sentencepiece vocabulary's space, which stands before every text, has to be
        put there: its converted form leaves it out before a text that starts with one."""
        spaced, bare = self.start([" a", "a"])
        return spaced == bare


def _copy(fast: Any) -> Any:
    copy = type(fast).from_str(fast.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _encode(fast: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encodings = fast.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]
