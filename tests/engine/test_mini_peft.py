"""Adapters of the real small models in PEFT, on the transformers checkpoint: the same logits.

Each adapter is strong, so that a projection left out would show.
"""

from __future__ import annotations

import itertools
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import reference
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamina.data.batches import Batch, make_batch
from lamina.engine.prepare import prepare
from lamina.engine.step import Engine
from lamina.engine.streamed import resident
from lamina.lora.adapter import Adapter, LoraSettings
from lamina.models import load_family
from lamina.models.mini import ensure_mini
from lamina.store.layout import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

TEXT = (
    "The Battle of Trafalgar was a naval engagement that took place on 21 October 1805 between the "
    "British Royal Navy and the combined fleets of the French and Spanish Navies."
)
CPU = torch.device("cpu")
MINIS = ("mini-mixtral", "mini-maverick")


def decoded(store: Store) -> Iterator[tuple[str, Tensor]]:
    """A store's weights under transformers' parameter names: the dequantized checkpoint."""
    family = load_family(store.config)
    source = resident(store, torch.float32, CPU)
    for block in family.blocks:
        with source.dense(block) as tensors:
            for plain in block.plain:
                key = plain.sources[0][0].key
                if block.experts is not None and plain.name == block.experts.router:
                    key = f"{block.experts.router_module}.weight"
                yield key, tensors[plain.name]
            for linear in block.linears:
                yield f"{linear.module}.weight", tensors[linear.name]
        if block.experts is None:
            continue
        for name in ("gate_up", "down"):
            stack = []
            for e in range(block.experts.num_experts):
                with source.expert(block, e) as expert:
                    matrix = expert.gate_up_FH if name == "gate_up" else expert.down_HI
                    stack.append(matrix.T if block.experts.transposed else matrix)
            yield f"{block.experts.module}.{name}_proj", torch.stack(stack)


def in_peft(name: str, store: Store, adapter: Path) -> Any:
    """An adapter in PEFT, in fp32, on the checkpoint of a small model as the store holds it."""
    base: Any = AutoModelForCausalLM.from_pretrained(ensure_mini(name), dtype=torch.float32)
    if store.codec != "bf16":
        parameters = dict(base.named_parameters())
        with torch.no_grad():
            for key, tensor in decoded(store):
                parameters.pop(key).copy_(tensor)
        assert not parameters, "the store holds every parameter"
    return PeftModel.from_pretrained(base, adapter).eval()


def strong_adapter(store: Store, tmp_path: Path) -> Adapter:
    family = load_family(store.config)
    lora = LoraSettings(r=4, lora_alpha=8, target_modules=("all-linear",))
    adapter = Adapter(family, lora, seed=0, device="cpu")
    reference.randomize(adapter, None)
    for block in adapter.blocks.values():
        for pair in block.factors():
            pair.b.data.mul_(0.8)
    adapter.save(tmp_path / "adapter", base_model="mini")
    return adapter


def logprobs(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def ours(store: Store, adapter: Adapter | None, ids: list[int], dtype: torch.dtype) -> Tensor:
    family = load_family(store.config)
    engine = Engine(family, resident(store, dtype, CPU), adapter)
    return engine.logits(make_batch([(ids, [True] * len(ids))]))


def token_ids(store: Store) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(store.path)(TEXT)["input_ids"]
    return ids


@pytest.mark.parametrize("name", MINIS)
@pytest.mark.parametrize("codec", ["bf16", "nf4"])
def test_peft_gives_the_same_logits(name: str, codec: str, tmp_path: Path) -> None:
    store = prepare(name, codec=codec)
    adapter = strong_adapter(store, tmp_path)
    ids = token_ids(store)
    model = in_peft(name, store, tmp_path / "adapter")
    with torch.no_grad():
        in_fp32 = model(torch.tensor([ids])).logits[0]
        with model.disable_adapter():
            without = model(torch.tensor([ids])).logits[0]
    assert reference.distance(ours(store, adapter, ids, torch.float32), in_fp32) < 1e-5
    moved = (logprobs(in_fp32) - logprobs(without)).abs().mean()
    assert moved > 0.5


@pytest.mark.parametrize("name", MINIS)
@pytest.mark.parametrize("codec", ["bf16", "nf4"])
def test_a_trained_adapter_agrees_in_bf16(name: str, codec: str, tmp_path: Path) -> None:
    """Log probabilities of the tokens that it was trained on: it moves them by some nats, so that a
    part left out would show. Rounding doesn't; with a random adapter it does, in PEFT as here
    (docs/log.md)."""
    store = prepare(name, codec=codec)
    sequences = some_text(store)
    batch = make_batch([(ids, [True] * len(ids)) for ids in sequences])
    adapter = trained_adapter(store, batch)
    adapter.save(tmp_path / "adapter", base_model="mini")
    mine = Engine(adapter.family, resident(store, torch.bfloat16, CPU), adapter).logprobs(batch)
    model = in_peft(name, store, tmp_path / "adapter").to(torch.bfloat16)
    theirs = targets_logprobs(model, sequences)
    with model.disable_adapter():
        without = targets_logprobs(model, sequences)
    moved, apart = (theirs - without).abs().mean(), (mine - theirs).abs().mean()
    print(f"{name} {codec}: moved {moved:.2f}, apart {apart:.4f}")
    assert moved > 0.5
    assert apart < 0.05


def some_text(store: Store) -> list[list[int]]:
    """Eight real texts of 64 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(store.path, model_max_length=10**9)
    texts = (tokenizer(text)["input_ids"][:64] for text in pydoc_data.topics.topics.values())
    return list(itertools.islice((ids for ids in texts if len(ids) == 64), 8))


def trained_adapter(store: Store, batch: Batch) -> Adapter:
    """LoRA on every projection, trained until it knows a batch by heart."""
    lora = LoraSettings(r=8, lora_alpha=16, target_modules=("all-linear",))
    adapter = Adapter(load_family(store.config), lora, seed=0, device="cpu")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-3, weight_decay=0.0)
    engine = Engine(adapter.family, resident(store, torch.bfloat16, CPU), adapter)
    for _ in range(12):
        adapter.zero_grad()
        engine.forward_backward(batch)
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
    return adapter


@torch.no_grad()
def targets_logprobs(model: Any, sequences: list[list[int]]) -> Tensor:
    """The log probabilities of every token but the first of each sequence."""
    logp = []
    for ids in sequences:
        all_SV = logprobs(model(torch.tensor([ids])).logits[0, :-1])
        logp.append(all_SV[torch.arange(len(ids) - 1), torch.tensor(ids[1:])])
    return torch.cat(logp)
