"""Every command, end to end, on a tiny random Mixtral with a tokenizer of bytes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.reference import save, tiny_mixtral

from lamina.cli.main import main
from lamina.telemetry.events import EvalEvent, StartEvent, StepEvent, read_events

#: ChatML: each turn between two marks.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Overrides of every run here.
SMALL = ["dtype=float32", "codec=bf16", "tokens_per_step=256", "max_length=128", "r=4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = save(tiny_mixtral(vocab_size=272), tmp_path_factory.mktemp("models") / "tiny")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: number for number, piece in enumerate([*marks, *letters])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(marks)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A folder with a recipe, data, a prepared store and a run."""
    folder = tmp_path_factory.mktemp("work")
    for name, numbers in (("train.jsonl", range(30)), ("held.jsonl", range(30, 36))):
        rows = (
            {
                "messages": [
                    {"role": "user", "content": f"{number} + 1?"},
                    {"role": "assistant", "content": f"{number + 1}."},
                ]
            }
            for number in numbers
        )
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(f"model: {checkpoint}\nstore: {folder / 'store'}\n")
    assert main(["prepare", str(checkpoint), "--codec", "bf16", "--store", f"{folder}/store"]) == 0
    words = ["--data", f"{folder}/train.jsonl", "--eval-data", f"{folder}/held.jsonl"]
    words += ["--out", f"{folder}/run", "max_steps=4", "learning_rate=1e-2", *SMALL]
    assert main(["tune", f"{folder}/tiny.yaml", *words]) == 0
    return folder


@pytest.fixture
def lamina(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in the work folder; gives its exit code, stdout and stderr."""
    monkeypatch.chdir(work)

    def run(*words: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(list(words))
        return (code, *capsys.readouterr())

    return run


Lamina = Callable[..., tuple[int, str, str]]


def test_prepare_prints_the_store(lamina: Lamina, checkpoint: Path) -> None:
    code, out, err = lamina("prepare", str(checkpoint), "--codec", "bf16", "--store", "store")

    assert (code, out, err) == (0, "store\n", "")


def test_store_show(lamina: Lamina, work: Path) -> None:
    code, out, _ = lamina("store", "show", "store")
    assert code == 0
    assert "codec        bf16\n" in out
    assert "\nmoe        3       15 " in out

    code, out, err = lamina("store", "show", "store", "--json")
    shown = json.loads(out)
    assert (code, err) == (0, "")
    assert shown["model_type"] == "mixtral"
    assert shown["kinds"]["moe"]["experts"] == 15
    held = sum(file.stat().st_size for file in (work / "store" / "blocks").iterdir())
    assert 0.8 * held < shown["total_bytes"] <= held


def test_store_verify(lamina: Lamina, work: Path) -> None:
    code, out, err = lamina("store", "verify", "store")
    assert (code, out) == (0, "")
    assert err == "store: every byte is as it was written\n"

    shutil.copytree(work / "store", work / "damaged")
    file = sorted((work / "damaged" / "blocks").iterdir())[2]
    content = bytearray(file.read_bytes())
    content[-5000] ^= 1
    file.write_bytes(content)
    code, out, err = lamina("store", "verify", "damaged")
    assert (code, out) == (1, "")
    assert err.startswith("error: damaged: the store is damaged\n  - ")
    assert file.name in err
    shutil.rmtree(work / "damaged")


def test_a_run_leaves_its_parts(work: Path) -> None:
    run = work / "run"
    events = read_events(run / "events.jsonl")

    assert isinstance(events[0], StartEvent)
    assert [e.step for e in events if isinstance(e, StepEvent)] == [1, 2, 3, 4]
    assert [e.step for e in events if isinstance(e, EvalEvent)] == [0, 4]
    assert (run / "recipe.yaml").is_file()
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]


def test_tune_in_words_and_as_json(lamina: Lamina) -> None:
    words = ("tune", "tiny.yaml", "--data", "train.jsonl", "max_steps=1", *SMALL)

    code, out, err = lamina(*words, "--out", "words")
    assert code == 0
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        "run",
        "loss",
        "steps",
        "tokens",
        "peak memory",
    ]
    lines = err.splitlines()
    assert lines[0].endswith("kB") or lines[0].endswith("MB")
    assert lines[1].startswith("step 1/1  loss ")
    assert lines[2:] == ["try it: lamina chat words"]

    code, out, _ = lamina(*words, "--out", "as-json", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 1


def test_tune_without_out_makes_a_run_in_runs(lamina: Lamina, work: Path) -> None:
    code, _, _ = lamina("tune", "tiny.yaml", "--data", "train.jsonl", "max_steps=1", *SMALL)

    assert code == 0
    (run,) = (work / "runs").iterdir()
    assert run.name.startswith("tiny-20")


def test_tune_with_data_that_has_nothing_to_learn(lamina: Lamina, work: Path) -> None:
    (work / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\nnot JSON\n')

    code, out, err = lamina("tune", "tiny.yaml", "--data", "bad.jsonl", "--out", "bad", *SMALL)

    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "bad.jsonl" in err
    assert not (work / "bad").exists()


def test_tune_names_a_target_that_is_not_there(lamina: Lamina) -> None:
    words = ("tune", "tiny.yaml", "--data", "train.jsonl", "--out", "bad", *SMALL)

    code, _, err = lamina(*words, "target_modules=q_porj")

    assert code == 1
    assert "q_porj" in err
    assert "Traceback" not in err


def test_eval(lamina: Lamina, work: Path) -> None:
    code, out, err = lamina("eval", "run", "--data", "held.jsonl", "--json")
    tuned = json.loads(out)
    assert (code, err) == (0, "")
    _, out, _ = lamina("eval", "run", "--data", "held.jsonl", "--no-adapter", "--json")
    base = json.loads(out)

    summary = json.loads((work / "run" / "summary.json").read_text())
    assert tuned["loss"] == pytest.approx(summary["eval_loss_after"], abs=1e-6)
    assert base["loss"] == pytest.approx(summary["eval_loss_before"], abs=1e-6)
    assert (tuned["rows"], tuned["loss_tokens"]) == (6, base["loss_tokens"])

    code, out, _ = lamina("eval", "run", "--data", "held.jsonl")
    assert code == 0
    assert out.startswith(f"loss         {tuned['loss']:.4f}\n")


def test_generate(lamina: Lamina) -> None:
    words = ("generate", "run", "--max-new-tokens", "5", "--system", "Add.")

    code, out, err = lamina(*words, "7 + 1?", "8 + 1?", "--json")
    both = json.loads(out)
    assert code == 0
    assert [answer["prompt"] for answer in both] == ["7 + 1?", "8 + 1?"]
    assert all(1 <= len(answer["token_ids"]) <= 5 for answer in both)
    assert "read a token" in err

    code, streamed, _ = lamina(*words, "7 + 1?")
    assert (code, streamed) == (0, both[0]["text"] + "\n")
    code, piped, _ = lamina(*words, stdin="7 + 1?\n")
    assert (code, piped) == (0, streamed)
    code, several, _ = lamina(*words, "7 + 1?", "8 + 1?")
    assert (code, several) == (0, f"{both[0]['text']}\n\n{both[1]['text']}\n")


def test_generate_with_and_without_the_adapter(lamina: Lamina) -> None:
    words = ("generate", "run", "--max-new-tokens", "5", "7 + 1?", "--json")

    _, tuned, _ = lamina(*words)
    _, base, _ = lamina(*words, "--no-adapter")
    _, store, _ = lamina(*("generate", "store", *words[2:]))

    assert json.loads(tuned)[0]["token_ids"] != json.loads(base)[0]["token_ids"]
    assert json.loads(store)[0]["prompt_tokens"] == json.loads(base)[0]["prompt_tokens"]


def test_chat_in_a_pipe(lamina: Lamina) -> None:
    words = ("--max-new-tokens", "4", "--temperature", "0")
    _, first, _ = lamina("generate", "run", *words, "7 + 1?")

    code, out, err = lamina(
        "chat", "run", *words, stdin="7 + 1?\n\n/reset\n7 + 1?\n/what\n/exit\nnever\n"
    )

    assert code == 0
    assert out == first * 2
    lines = err.splitlines()
    assert lines[1] == "a new conversation"
    assert lines[3].startswith("/what: there is no such command")
    assert len(lines) == 4
    assert "read a token" in lines[0]


def test_ctrl_c_leaves_an_adapter_that_loads(lamina: Lamina, work: Path) -> None:
    words = ["tune", "tiny.yaml", "--data", "train.jsonl", "--out", "cut", "max_steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lamina", *words, *SMALL],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "(interrupted)" in out
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
    assert json.loads((work / "cut" / "summary.json").read_text())["interrupted"] is True
    assert lamina("eval", "cut", "--data", "held.jsonl")[0] == 0


def test_nothing_but_our_own_words(work: Path) -> None:
    """In a process of its own, where libraries print whatever they print when first imported."""
    done = subprocess.run(
        [sys.executable, "-m", "lamina", "generate", "run", "Hi", "--max-new-tokens", "2"],
        cwd=work,
        env={key: value for key, value in os.environ.items() if key != "NO_COLOR"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.rstrip().endswith("read a token")
