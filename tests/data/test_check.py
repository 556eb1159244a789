from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lamina.data import parallel
from lamina.data.check import Report, check
from lamina.data.codes import CODES
from lamina.data.examine import examine_block
from lamina.data.formats import Input
from lamina.data.template import Renderer
from lamina.errors import DataError


def turn(role: str, content: Any = "text", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [turn(roles[k % 2], text) for k, text in enumerate(texts)], **more}


def call(name: str = "f", arguments: Any = "{}", call_id: str | None = "c1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_chat(*calls: Any, results: tuple[Any, ...] = ("c1",), **more: Any) -> dict[str, Any]:
    return {
        "messages": [
            turn("user", "q"),
            turn("assistant", None, tool_calls=list(calls)),
            *(turn("tool", "1", tool_call_id=call_id) for call_id in results),
            turn("assistant", "a"),
        ],
        **more,
    }


TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
GOOD = chat("What is two plus two?", "Four.")


def codes(report: Report) -> dict[str, int]:
    return {finding.code: finding.count for finding in report.findings}


def run(write_rows: Any, rows: list[Any], **options: Any) -> Report:
    options.setdefault("near_duplicates", False)
    return check(Input(write_rows(rows)), **options)


ROWS: list[tuple[Any, str]] = [
    ("{", "not-json"),
    (b'{"text": "\xff"}', "encoding"),
    ('{"text": "a", "text": "b"}', "duplicate-key"),
    ("[]", "not-object"),
    ('{"text": "a", "n": NaN}', "nan"),
    ({"x": 1}, "unknown-shape"),
    ({"messages": "x"}, "wrong-type"),
    ({"messages": []}, "empty-messages"),
    ({"messages": [{"content": "x"}]}, "missing-role"),
    ({"messages": [turn("robot")]}, "unknown-role"),
    ({"messages": [turn("user", None)]}, "missing-content"),
    ({"messages": [turn("user", [{"type": "image_url"}])]}, "not-text"),
    (chat("q", " "), "empty-assistant"),
    (chat("q"), "nothing-to-learn"),
    ({"messages": [turn("assistant", weight=2)]}, "weight"),
    ({"text": " "}, "empty-text"),
    ({"input_ids": [1, 2], "labels": [1]}, "labels"),
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "same-answers"),
    (chat(" ", "a"), "empty-turn"),
    ({"messages": [turn("assistant")]}, "role-order"),
    ({"messages": [turn("user"), turn("user"), turn("assistant")]}, "role-order"),
    ({"messages": [turn("user"), turn("system"), turn("assistant")]}, "role-order"),
    (chat("q", "a", "unanswered"), "last-turn"),
    (chat("<|im_end|>\n<|im_start|>assistant", "a"), "control-tokens"),
    (chat("q", "a [/INST] b"), "control-tokens"),
    (chat("</s>", "a"), "control-tokens"),
    ({"messages": [turn("user"), turn("user", tool_calls=[call()])]}, "tool-calls"),
    (tool_chat(call(arguments="{"), tools=[TOOL]), "tool-arguments"),
    (tool_chat(call(arguments="[1]")), "tool-arguments"),
    (tool_chat(call(arguments='{"city": 3}'), tools=[TOOL]), "tool-arguments"),
    (tool_chat(call(arguments="{}"), tools=[TOOL]), "tool-arguments"),
    (tool_chat(call("g"), tools=[TOOL]), "unknown-tool"),
    (chat("q", "a", tools=[{"function": {"name": "f", "parameters": {"type": 3}}}]), "tool-schema"),
    (chat("q", "a", tools=[{"function": {}}]), "tool-schema"),
    (tool_chat(call(), results=("c1", "c2")), "orphan-result"),
    ({"messages": [turn("user"), turn("tool"), turn("assistant")]}, "loose-result"),
    (
        {"messages": [turn("user"), turn("tool", tool_call_id="x"), turn("assistant")]},
        "orphan-result",
    ),
    (tool_chat(call(), call(), results=("c1", "c1")), "duplicate-call-id"),
    (tool_chat(call(), results=()), "unanswered-call"),
    (tool_chat(call(call_id=None), results=(None,)), None),  # type: ignore[list-item]
    (tool_chat(call(), results=(None,)), "missing-call-id"),
    ({**GOOD, "text": "x"}, "ambiguous"),
    ({**GOOD, "source": "x"}, "unknown-columns"),
]


@pytest.mark.parametrize(("row", "code"), ROWS)
def test_each_mistake_has_its_code(row: Any, code: str | None, write_rows: Any) -> None:
    report = run(write_rows, [GOOD, row])
    found = codes(report)
    if code is None:
        assert found == {}
        return
    assert found[code] == 1
    finding = next(f for f in report.findings if f.code == code)
    assert "data.jsonl:2 " in finding.first[0]
    assert finding.advice
    assert finding.severity == CODES[code].severity
    assert report.ok == all(CODES[c].severity != "error" for c in found)
    assert report.bad_rows == (not report.ok)


def test_a_good_dataset_has_no_findings(write_rows: Any) -> None:
    rows = [
        {"messages": [turn("system", "s"), *chat(f"question {k}", f"answer {k}")["messages"]]}
        for k in range(30)
    ]
    rows.append(tool_chat(call(arguments='{"city": "Oslo"}'), tools=[TOOL]))
    report = run(write_rows, rows, near_duplicates=True)
    assert report.findings == []
    assert (report.ok, report.rows, report.bad_rows) == (True, 31, 0)


def test_every_code_is_documented_and_every_code_in_the_source_is_known() -> None:
    source = Path(parallel.__file__).parent
    text = "".join(path.read_text() for path in source.rglob("*.py"))
    import re

    used = set(re.findall(r'RowError\(\s*"([a-z-]+)"', text))
    assert used
    assert used <= set(CODES)
    for code, entry in CODES.items():
        assert code == entry.code
        assert entry.advice.endswith(".")


def test_findings_count_all_and_show_the_first(write_rows: Any) -> None:
    report = run(write_rows, ["{"] * 7 + [GOOD])
    (finding,) = report.findings
    assert (finding.count, len(finding.first)) == (7, 5)
    assert finding.first[0].startswith(f"{write_rows([])}:1 is not JSON")


def test_errors_come_first_then_what_most_rows_have(write_rows: Any) -> None:
    rows = [chat("q", "a", "b"), *[{**chat(f"q{k}", f"a{k}"), "id": k} for k in range(3)], "{"]
    report = run(write_rows, rows)
    assert [f.code for f in report.findings] == ["not-json", "last-turn", "unknown-columns"]


def test_a_byte_order_mark_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert codes(check(Input(path))) == {"bom": 1}


def test_duplicates_name_the_first(write_rows: Any) -> None:
    other = chat("q", "a")
    path = write_rows([])
    report = run(write_rows, [GOOD, other, GOOD, {**GOOD, "id": 1}, other])
    assert codes(report)["duplicate"] == 3
    finding = next(f for f in report.findings if f.code == "duplicate")
    assert finding.first == [
        f"{path}:3 is the same as {path}:1.",
        f"{path}:4 is the same as {path}:1.",
        f"{path}:5 is the same as {path}:2.",
    ]


def words(seed: int, count: int = 60) -> str:
    generator = random.Random(seed)
    return " ".join(str(generator.randrange(10**6)) for _ in range(count))


def test_near_duplicates(write_rows: Any) -> None:
    texts = [words(k) for k in range(80)]
    near = [text.replace(text.split()[30], "changed").upper() for text in texts[:20]]
    report = run(write_rows, [{"text": t} for t in texts + near], near_duplicates=True)
    assert codes(report) == {"near-duplicate": 20}
    (finding,) = report.findings
    assert finding.first[0].startswith(f"{write_rows([])}:81 is ")
    assert finding.first[0].endswith(f"% the same as {write_rows([])}:1.")
    assert codes(run(write_rows, [{"text": t} for t in texts + near])) == {}


def test_leakage(write_rows: Any) -> None:
    train = [chat(words(k), words(100 + k)) for k in range(10)]
    changed = [{"messages": [m, turn("assistant", "other")]} for m, _ in [train[2]["messages"]]]
    close = chat(words(3), words(103) + " more")
    held_out = [train[1], *changed, close, chat("new", "answer")]
    path = write_rows(train)
    eval_path = write_rows(held_out, "eval.jsonl")
    report = check(Input(path), eval_data=Input(eval_path))
    assert codes(report) == {"leakage": 1, "prompt-leakage": 2, "near-leakage": 1}
    first = {f.code: f.first[0] for f in report.findings}
    assert first["leakage"] == f"{path}:2 is the same as {eval_path}:1."
    assert first["prompt-leakage"] == f"{path}:3 has the question of {eval_path}:2."
    assert first["near-leakage"].endswith(f"% the same as {eval_path}:3.")
    assert report.rows == 10


def test_constant_answers(write_rows: Any) -> None:
    rows = [chat(f"question {k}", "I can't help." if k % 3 == 0 else f"a{k}") for k in range(300)]
    report = run(write_rows, rows)
    assert codes(report) == {"constant-answers": 100}
    assert '"I can\'t help."' in report.findings[0].first[0]
    assert codes(run(write_rows, rows[:30])) == {}


def test_a_column_that_another_is_mapped_over_is_named(write_rows: Any) -> None:
    rows = write_rows([{"messages": "old", "chat": GOOD["messages"], "id": 1}])
    report = check(Input(rows, columns={"messages": "chat"}), near_duplicates=False)
    assert codes(report) == {"unknown-columns": 1}
    assert (
        "not trained: 'messages', 'id' ('chat' is read as 'messages', as mapped)"
        in (report.findings[0].first[0])
    )


def test_fields_of_messages_that_are_not_trained_are_named(write_rows: Any) -> None:
    row = {"messages": [turn("user", "q", id=1), turn("assistant", "a", reasoning="r", name=None)]}
    report = run(write_rows, [row])
    assert codes(report) == {"unknown-columns": 1}
    assert "in its messages that are not trained: 'id', 'reasoning'." in report.findings[0].first[0]


def test_mixed_formats_are_noted(write_rows: Any) -> None:
    report = run(write_rows, [GOOD, {"text": "a"}])
    assert codes(report) == {"mixed-shapes": 1}
    assert "1 messages, 1 text" in report.findings[0].first[0]
    assert report.ok


def test_what_tokens_show(write_rows: Any, smol: Any) -> None:
    rows = [
        chat("short", "answer"),
        chat("long", "word " * 100),
        tool_chat(call()),
        chat("q", "a \U00040000"),
        chat("<empty_output>", "a"),
        {"text": "a"},
    ]
    report = run(write_rows, rows, renderer=Renderer(smol), max_length=60)
    assert codes(report) == {
        "too-long": 1,
        "tools-ignored": 1,
        "unencodable": 1,
        "control-tokens": 1,
        "mixed-shapes": 1,
    }
    first = {f.code: f.first[0] for f in report.findings}
    assert ":2 has 1" in first["too-long"]
    assert first["unencodable"].endswith(":4 loses characters of messages[1].")
    assert report.seconds["tokens"] > 0


def test_references_in_schemas_are_never_fetched(write_rows: Any) -> None:
    schema = {"$ref": "http://localhost:1/schema.json"}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    report = run(write_rows, [tool_chat(call(), tools=[tool])])
    assert codes(report) == {"tool-arguments": 1}
    assert "its schema can't be used" in report.findings[0].first[0]


def test_personal_data_needs_its_package(write_rows: Any) -> None:
    rows = [chat("write to ann@example.org or call +49 30 901820", "ok")]
    try:
        import presidio_analyzer  # noqa: F401
    except ImportError:
        with pytest.raises(DataError, match="presidio-analyzer"):
            run(write_rows, rows, personal_data=True)
    else:
        report = run(write_rows, rows, personal_data=True)
        assert codes(report)["pii"] == 2
    assert codes(run(write_rows, rows)) == {}


def test_several_processes_find_the_same(
    write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(1)
    pool = [
        GOOD,
        "{",
        chat("q", "a", "b"),
        {"x": 1},
        {"text": "a \x85 b\r"},
        "",
        "   ",
        '{"a":\r1}',
    ]
    rows = [
        generator.choice(pool) if generator.random() < 0.2 else chat(words(k), words(k + 9999))
        for k in range(600)
    ]
    data = Input([write_rows(rows), write_rows(rows[100:300], "second.jsonl")])
    alone = check(data, eval_data=Input(write_rows(rows[:30], "eval.jsonl")))
    monkeypatch.setattr(parallel, "WORTH_BYTES", 0)
    monkeypatch.setattr(parallel, "BLOCK_BYTES", 5_000)
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: {0, 1, 2})
    together = check(data, eval_data=Input(tmp_path / "eval.jsonl"))
    alone.seconds = together.seconds = {}
    assert together == alone
    assert len(alone.findings) > 5
    row_by_row = list(data.rows())
    assert alone.rows == len(row_by_row)


def test_an_error_of_a_worker_is_an_error_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "WORTH_BYTES", 0)
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: {0, 1})
    options = {"shape": "no such shape", "columns": {}, "prompts": False, "near": False}
    blocks = [parallel.Block(0, 1, b'{"text": "a"}\n')] * 3
    with pytest.raises(DataError, match="no data format 'no such shape'"):
        list(parallel.map_blocks("check", examine_block, options, blocks, 1))
