"""The page `docs/data.md`, made from the code that it describes:

python -m lamina.data.reference > docs/data.md
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable

from lamina.data.chat.pieces import MASKS
from lamina.data.codes import CODES, Severity
from lamina.data.containers import SUFFIXES
from lamina.data.lengths import POLICIES
from lamina.data.shapes import SHAPES

__all__ = ["LLAMA4_PREVIEW", "MIXTRAL_PREVIEW", "PREVIEWED", "page"]

#: A conversation, and how the models read and learn it; a test holds them together.
PREVIEWED = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
}
LLAMA4_PREVIEW = [
    "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
    "<|header_start|>user<|header_end|>\n\nHi<|eot|><|header_start|>assistant<|header_end|>\n\n"
    "⟦Hello!<|eot|>⟧<|header_start|>user<|header_end|>\n\nBye<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\n⟦See you<|eot|>⟧"
]
MIXTRAL_PREVIEW = [
    "<s>[INST] Be brief.\n\nHi[/INST]⟦ Hello!</s>⟧",
    "<s>[INST] Hi[/INST] Hello!</s>[INST] Be brief.\n\nBye[/INST]⟦ See you</s>⟧",
]

_CONTAINERS = {
    "jsonl": "one JSON object a line",
    "json": "an array of objects; an object of columns (read at once); or one object, a row",
    "csv": "a table with a header, which also tells whether semicolons stand between the cells; "
    "lists and objects are JSON text in a cell",
    "tsv": "the same, with tabs",
    "parquet": "needs pyarrow, as do Arrow files and zstd",
    "arrow": "the file format and the stream format",
    "text": "plain text: the file is one document, or each paragraph or line is one",
}

_INTRODUCTION = """\
# Data

Any chat dataset in, exactly the intended tokens trained, and everybody can see that. Every command
that takes data (`lamina tune`, `lamina eval`, `lamina data ...`) takes it in all of these formats.

The commands themselves are in [data-commands.md](data-commands.md). This page is made from the code
(`python -m lamina.data.reference`), and a test holds it to it.

## Files

Compression and container are told by the content of a file; its name decides only between formats
that look alike. Files may be compressed with gzip or zstd. Several files, glob patterns
(`data/*.jsonl`), folders saved with `save_to_disk`, and datasets on the Hugging Face hub
(`owner/name`, `owner/name:config`, each with `@split` if need be; this needs the package
`datasets`) work wherever a file does. Text is UTF-8; a byte order mark is passed over. Where rows
have all the same columns (Parquet, Arrow, datasets), a null is read as if its column weren't there.
"""

_SHAPES = """\
## Formats

A row's format is told by its columns. Where two fit, the one further up in this list is taken, and
`lamina data detect` lists the other. Columns that a format doesn't know are not trained, and
`lamina data convert` carries them along.

All formats are read into one canonical form: messages with roles, tool calls and a flag for each
message whether it is learned; or text in pieces that are learned or only read. Converting writes a
format from that form, or refuses a row that the format can't carry: nothing is lost silently.
Tool-call arguments are kept as JSON values, so their spacing may change.
"""

_MASKS = """\
## What is learned

A conversation is written by the model's chat template and cut at its assistant turns. A learned
turn is learned from its first token to the token that ends it, that one included: a model must
learn to stop. The header of the turn is read, not learned: generation gives it. The parts are
tokenized one by one, as inference sees them: the prompt, then what the model writes.
"""

_TEMPLATES = """\
For Llama 4 and Mixtral 8x22B the templates are Lamina's own, and give the same tokens as the
vendors' encoders. Control tokens written in a message are plain text there. For other models the
tokenizer's own template is used. It must be *prefix-stable*: what it writes for the beginning of a
conversation must be the beginning of what it writes for the whole. One that takes back something it
has written, such as the reasoning of earlier turns, can't be masked turn by turn; it is refused
with the reason, and can be used to learn only the last turn (`last`).

Mixtral's format moves the system prompt and the tools into the last user turn. A conversation that
has either becomes several samples, one for each user turn with a trained answer, each exactly what
the model reads when it writes that answer.

This conversation:
"""

_LENGTHS = """\
## Long rows

Sequences are never padded, and never see each other. Of rows with more tokens than `max_length`:
"""

_CODES = """\
## What `check` looks for

Errors stop a training run; warnings and notes don't. The exit code of `lamina data check` is 1 if
there is an error. `lamina data check --fix` writes a corrected copy with only the mends that need
no judgement, and lists them.
"""


def page() -> str:
    """The page, as Markdown."""
    parts = [
        _INTRODUCTION,
        _table(
            ("container", "names", ""),
            ((name, _suffixes(name), about) for name, about in _CONTAINERS.items()),
        ),
        _SHAPES,
        *(_shape(number) for number in range(len(SHAPES))),
        _MASKS,
        _table(("mask", "learns"), MASKS.items()),
        _TEMPLATES,
        _block(json.dumps(PREVIEWED), "json"),
        "is read by Llama 4 as one sample, of which the parts between ⟦ and ⟧ are learned:\n",
        *(_block(text) for text in LLAMA4_PREVIEW),
        "and by Mixtral 8x22B as two:\n",
        *(_block(text) for text in MIXTRAL_PREVIEW),
        _LENGTHS,
        _table(("policy", "what happens"), POLICIES.items()),
        _CODES,
        *(_codes(severity) for severity in ("error", "warning", "note")),
    ]
    return "\n".join(parts)


def _suffixes(container: str) -> str:
    return " ".join(f"`{suffix}`" for suffix, known in SUFFIXES.items() if known == container)


def _shape(number: int) -> str:
    shape = SHAPES[number]
    columns = ", ".join(f"`{name}`" for name in sorted(shape.columns))
    about = "\n".join(textwrap.wrap(shape.about, 100))
    title = shape.title[0].upper() + shape.title[1:]
    example = _block(json.dumps(shape.row), "json")
    return f"### `{shape.name}`: {title}\n\n{about}\n\n{example}\nColumns: {columns}.\n"


def _codes(severity: Severity) -> str:
    codes = [code for code in CODES.values() if code.severity == severity]
    rows = [
        (f"`{c.code}`", c.title, c.advice + (f" With `--fix`: {c.fixed}." if c.fixed else ""))
        for c in codes
    ]
    return f"### {severity.capitalize()}s\n\n{_table(('code', 'found', 'what to do'), rows)}"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _block(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```\n"


if __name__ == "__main__":
    print(page(), end="")
