"""What a model will read and learn, made visible: on a terminal, as JSON, or as a page to share."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lamina.data.formats import Input
from lamina.data.messages import RowError
from lamina.data.template import Renderer, Sample

__all__ = ["Part", "PreviewRow", "PreviewSample", "preview", "to_html", "to_json", "to_text"]

#: What stands around learned text where there is no colour.
OPEN, CLOSE = "⟦", "⟧"
_LEARNED, _READ, _RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Part:
    """Tokens that together make whole characters."""

    ids: tuple[int, ...]
    text: str
    learned: bool


@dataclass(frozen=True)
class PreviewSample:
    """One sequence, in parts."""

    sample: Sample
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class PreviewRow:
    """A row as it will be trained.

    Args:
        error: why it can't be, or None.
    """

    place: str
    shape: str | None
    samples: tuple[PreviewSample, ...]
    error: str | None = None


def preview(
    data: Input, renderer: Renderer, *, start: int = 0, count: int = 3
) -> Iterator[PreviewRow]:
    """Rows as they will be trained, one by one as they are asked for.

    Args:
        start: how many rows to pass over.
        count: how many rows to show.

    Raises:
        DataError: the data can't be read.
    """
    decode = _Decoder(renderer.tokenizer)
    for row in islice(data.rows(), start, start + count):
        place, shape = data.place(row), row.shape.name if row.shape else None
        if isinstance(row.example, RowError):
            yield PreviewRow(place, shape, (), row.example.message)
            continue
        (result,) = renderer.render_many([row.example])
        if isinstance(result, RowError):
            yield PreviewRow(place, shape, (), result.message)
            continue
        samples = tuple(PreviewSample(s, tuple(decode.parts(s))) for s in result)
        yield PreviewRow(place, shape, samples)


class _Decoder:
    """Turns tokens back into text, piece by piece."""

    #: A character has at most so many bytes, each of which may be a token.
    _LONGEST = 4

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # Decoded alone, a token may lose its leading space: there has to be one before it.
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._skip = len(self._decode(self._before))

    def parts(self, sample: Sample) -> Iterator[Part]:
        ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
        start = 0
        for t in range(1, len(ids) + 1):
            text = self._decode([*self._before, *ids[start:t]])[self._skip :]
            cut = text.endswith("\ufffd") and t - start < self._LONGEST
            if cut and t < len(ids) and mask[t] == mask[start]:
                continue
            yield Part(tuple(ids[start:t]), text, mask[start])
            start = t
            if start == len(ids):
                return

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def to_text(rows: Iterable[PreviewRow], *, color: bool, ids: bool = False) -> str:
    """Rows for a terminal. Learned text is green or, without colour, between ⟦ and ⟧.

    Args:
        ids: also write each token's id.
    """
    blocks = []
    for row in rows:
        if row.error is not None:
            blocks.append(f"{row.place}: {row.error}")
        elif not row.samples:
            blocks.append(f"{row.place}: not trained")
        for number, shown in enumerate(row.samples, 1):
            of = f", sample {number} of {len(row.samples)}" if len(row.samples) > 1 else ""
            sample = shown.sample
            blocks.append(
                f"{row.place} ({row.shape}{of}): {len(sample.input_ids)} tokens, "
                f"{sample.num_loss_tokens} learned\n{_sample_text(shown, color, ids)}"
            )
    return "\n\n".join(blocks) + "\n"


def _sample_text(shown: PreviewSample, color: bool, ids: bool) -> str:
    spans = []
    for learned, parts in _runs(shown.parts):
        text = "".join(_with_ids(part) if ids else _printable(part.text) for part in parts)
        if color:
            spans.append(f"{_LEARNED if learned else _READ}{text}{_RESET}")
        else:
            spans.append(f"{OPEN}{text}{CLOSE}" if learned else text)
    return "".join(spans)


def _runs(parts: Iterable[Part]) -> Iterator[tuple[bool, list[Part]]]:
    """Consecutive parts that are learned, or aren't."""
    run: list[Part] = []
    for part in parts:
        if run and run[-1].learned != part.learned:
            yield run[0].learned, run
            run = []
        run.append(part)
    if run:
        yield run[0].learned, run


def _with_ids(part: Part) -> str:
    numbers = ",".join(map(str, part.ids))
    return f"{_printable(part.text)}({numbers})"


def _printable(text: str) -> str:
    """A text without characters that would drive a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def to_json(rows: Iterable[PreviewRow]) -> Iterator[dict[str, Any]]:
    """A JSON object for each sample, or for a row that has none."""
    for row in rows:
        start = {"place": row.place, "format": row.shape}
        if row.error is not None or not row.samples:
            yield {**start, "error": row.error, "input_ids": [], "labels": []}
        for shown in row.samples:
            yield {
                **start,
                "input_ids": shown.sample.input_ids.tolist(),
                "labels": shown.sample.labels.tolist(),
            }


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: 1rem; border-radius: .4rem;
      border: 1px solid #8886; font: 13px/1.7 ui-monospace, monospace; }
pre span { color: #888; border-radius: .15rem; }
pre mark { color: inherit; background: #2da44e33; border-bottom: 2px solid #2da44e; }
pre span:hover, pre mark:hover { outline: 1px solid; }
.error { color: #cf222e; }
small { color: #888; font-weight: normal; }
"""


def to_html(rows: Iterable[PreviewRow], *, title: str) -> str:
    """A page of its own, without scripts and without anything to load: hovering over a token shows
    its id."""
    body = []
    for row in rows:
        heading = html.escape(row.place)
        if row.error is not None or not row.samples:
            reason = html.escape(row.error or "not trained")
            body.append(f'<h2>{heading}</h2>\n<p class="error">{reason}</p>')
        for shown in row.samples:
            sample = shown.sample
            body.append(
                f"<h2>{heading} <small>{row.shape}, {len(sample.input_ids)} tokens, "
                f"{sample.num_loss_tokens} learned</small></h2>\n"
                f"<pre>{''.join(map(_html_part, shown.parts))}</pre>"
            )
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n"
        "<p>What the model reads is grey; what it learns to write is <mark>marked</mark>.</p>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _html_part(part: Part) -> str:
    tag = "mark" if part.learned else "span"
    numbers = " ".join(map(str, part.ids))
    text = html.escape(part.text).replace("\n", "↵\n")
    return f'<{tag} title="{numbers}">{text}</{tag}>'
