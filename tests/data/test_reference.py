from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lamina.data.chat.pieces import MASKS
from lamina.data.codes import CODES
from lamina.data.formats import Input
from lamina.data.lengths import POLICIES
from lamina.data.preview import preview, to_text
from lamina.data.reference import LLAMA4_PREVIEW, MIXTRAL_PREVIEW, PREVIEWED, page
from lamina.data.shapes import SHAPES, ShapeFinder
from lamina.data.template import Renderer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "python -m lamina.data.reference > docs/data.md"


def test_the_page_holds_every_format_code_mask_and_policy() -> None:
    text = page()
    for name in [*(shape.name for shape in SHAPES), *CODES]:
        assert f"`{name}`" in text
    for name in [*MASKS, *POLICIES]:
        assert f"| {name} |" in text


def test_the_examples_on_the_page_are_read() -> None:
    examples = re.findall(r"### `([a-z-]+)`.*?```json\n(.*?)\n```", page(), flags=re.DOTALL)
    assert len(examples) == len(SHAPES)
    for name, example in examples:
        row = json.loads(example)
        shape = ShapeFinder().find(row)
        assert shape.name == name
        shape.read(row)


def test_the_previews_on_the_page_are_what_the_models_read(
    llama_tokenizer: Any, mistral_tokenizer: Any, write_rows: Any
) -> None:
    data = Input(write_rows([PREVIEWED]))
    for tokenizer, shown in (
        (llama_tokenizer, LLAMA4_PREVIEW),
        (mistral_tokenizer, MIXTRAL_PREVIEW),
    ):
        rows = preview(data, Renderer(tokenizer))
        blocks = re.split(r"(?m)^.*data\.jsonl:1 \(messages.*learned\n", to_text(rows, color=False))
        assert [block.strip("\n") for block in blocks[1:]] == shown
