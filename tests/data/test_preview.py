from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from lamina.data.formats import Input, Row
from lamina.data.preview import CLOSE, OPEN, preview, to_html, to_json, to_text
from lamina.data.stats import Quantiles, stats
from lamina.data.template import Renderer


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": t} for k, t in enumerate(texts)]}


@pytest.fixture(scope="module")
def renderer(smol: Any) -> Renderer:
    return Renderer(smol)


def test_a_preview_shows_what_is_learned_without_colour(
    renderer: Renderer, write_rows: Any
) -> None:
    path = write_rows([chat("Hi", "Héllo ☺ wörld"), {"messages": []}])
    shown = list(preview(Input(path), renderer))
    text = to_text(shown, color=False)
    assert f"<|im_start|>assistant\n{OPEN}Héllo ☺ wörld<|im_end|>{CLOSE}" in text
    assert text.count(OPEN) == 1
    sample = shown[0].samples[0].sample
    counts = f"{len(sample.input_ids)} tokens, {sample.num_loss_tokens} learned"
    assert text.startswith(f"{path}:1 (messages): {counts}\n<|im_start|>system\n")
    assert f"{path}:2: 'messages' is empty" in text
    colored = to_text(shown, color=True)
    assert OPEN not in colored
    assert "\x1b[1;32mHéllo" in colored


def test_parts_are_whole_characters_and_keep_every_token(
    renderer: Renderer, write_rows: Any
) -> None:
    (shown,) = preview(Input(write_rows([chat("日本語 ☺", "ok  then\n\tx")])), renderer)
    (sample,) = shown.samples
    assert [i for p in sample.parts for i in p.ids] == sample.sample.input_ids.tolist()
    assert "".join(p.text for p in sample.parts) == renderer.tokenizer.decode(
        sample.sample.input_ids
    )
    assert all("\ufffd" not in p.text for p in sample.parts)
    flags = [p.learned for p in sample.parts for _ in p.ids]
    assert flags == sample.sample.loss_mask.tolist()


def test_a_sentencepiece_tokenizer_keeps_its_spaces(
    mistral_tokenizer: Any, write_rows: Any
) -> None:
    renderer = Renderer(mistral_tokenizer)
    rows = preview(Input(write_rows([chat("a b", "c  d ☃")])), renderer)
    assert f"[INST] a b[/INST]{OPEN} c  d ☃</s>{CLOSE}" in to_text(rows, color=False)


def test_ids_on_request(renderer: Renderer, write_rows: Any) -> None:
    shown = preview(Input(write_rows([chat("Hi", "Yo")])), renderer)
    assert "<|im_end|>(2)" in to_text(shown, color=False, ids=True)


def test_control_characters_do_not_reach_the_terminal(renderer: Renderer, write_rows: Any) -> None:
    shown = list(preview(Input(write_rows([chat("\x1b[31mred\x07", "ok")])), renderer))
    assert "\x1b" not in to_text(shown, color=False)
    assert "\\x1b[31mred\\x07" in to_text(shown, color=False)


def test_rows_are_chosen_by_place(renderer: Renderer, write_rows: Any) -> None:
    path = write_rows([{"text": f"text {k}"} for k in range(9)])
    shown = preview(Input(path), renderer, start=4, count=2)
    assert [row.place for row in shown] == [f"{path}:5", f"{path}:6"]


def test_rows_are_read_as_they_are_asked_for(renderer: Renderer, write_rows: Any) -> None:
    data = Input(write_rows([{"text": f"text {k}"} for k in range(9)]))
    read: list[Row] = []
    rows = data.rows()
    data.rows = lambda: (read.append(row) or row for row in rows)  # type: ignore[method-assign, func-returns-value]
    shown = preview(data, renderer, count=9)
    assert read == []
    next(shown)
    assert len(read) == 1


def test_json_has_labels(renderer: Renderer, write_rows: Any) -> None:
    path = write_rows([chat("Hi", "Yo"), {"messages": []}])
    good, bad = to_json(preview(Input(path), renderer))
    assert len(good["input_ids"]) == len(good["labels"])
    learned = [
        i for i, label in zip(good["input_ids"], good["labels"], strict=True) if label != -100
    ]
    assert renderer.tokenizer.decode(learned) == "Yo<|im_end|>"
    assert (bad["error"], bad["input_ids"]) == ("'messages' is empty", [])


def test_a_page_of_its_own(renderer: Renderer, write_rows: Any) -> None:
    path = write_rows([chat("<script>alert(1)</script>", "a & b"), {"messages": []}])
    page = to_html(preview(Input(path), renderer), title="A <test>")
    assert "<script" not in page
    assert "http" not in page
    marked: list[str] = []

    class Reader(HTMLParser):
        inside = False
        opened: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.inside = tag == "mark"
            if tag not in ("meta",):
                self.opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.opened.pop() == tag
            self.inside = False

        def handle_data(self, data: str) -> None:
            if self.inside:
                marked.append(data)

    reader = Reader()
    reader.feed(page)
    assert reader.opened == []
    assert "".join(marked) == "markeda & b<|im_end|>"  # the legend, and what is learned
    assert "A &lt;test&gt;" in page


# -- stats ----------------------------------------------------------------------------------------


def test_stats_add_up(renderer: Renderer, write_rows: Any) -> None:
    rows: list[Any] = [{"text": "word " * (k + 1)} for k in range(50)]
    rows += [chat("Hi", "Yo"), chat("a", "b", "c", "d"), "{", {"messages": []}]
    path = write_rows(rows)
    found = stats(Input(path), renderer, max_length=40, tokens_per_step=100)
    samples = [s for r in rows[:52] for s in render(renderer, r)]
    sizes = np.array([len(s.input_ids) for s in samples])
    assert (found.rows, found.samples, found.several) == (54, 52, 0)
    assert found.unusable == {"not-json": 1, "empty-messages": 1}
    assert found.shapes == {"text": 50, "messages": 3}
    assert found.roles == {"user": 3, "assistant": 3}
    assert (found.turns.minimum, found.turns.maximum) == (2, 4)
    assert found.num_tokens == sizes.sum()
    assert found.num_loss_tokens == sum(s.num_loss_tokens for s in samples)
    assert found.loss_share == found.num_loss_tokens / found.num_tokens
    assert sum(bar.count for bar in found.histogram) == 52
    assert found.histogram[-1].low <= sizes.max() <= found.histogram[-1].high
    assert [long.num_tokens for long in found.longest] == sorted(sizes, reverse=True)[:10]
    assert found.too_long == found.dropped == (sizes > 40).sum()
    assert found.kept_tokens == sizes[sizes <= 40].sum()
    assert found.steps_per_epoch is not None
    assert found.kept_tokens / 100 <= found.steps_per_epoch <= found.kept_tokens / 50
    cut = stats(Input(path), renderer, max_length=40, too_long="truncate", tokens_per_step=10)
    assert (cut.dropped + cut.shortened, cut.steps_per_epoch) == (found.too_long, None)


def render(renderer: Renderer, row: dict[str, Any]) -> Any:
    from lamina.data.shapes import ShapeFinder

    return renderer.render(ShapeFinder().find(row).read(row))


def test_stats_show_rows_that_need_several_samples(mistral_tokenizer: Any, write_rows: Any) -> None:
    system = {"role": "system", "content": "s"}
    rows = [chat("a", "b", "c", "d"), {"messages": [system, *chat("a", "b", "c", "d")["messages"]]}]
    found = stats(Input(write_rows(rows)), Renderer(mistral_tokenizer))
    assert (found.rows, found.samples, found.several) == (2, 3, 1)


def test_quantiles_of_nothing() -> None:
    assert Quantiles.of(np.array([], dtype=np.int64)).maximum == 0
    assert Quantiles.of(np.arange(101)).p95 == 95
