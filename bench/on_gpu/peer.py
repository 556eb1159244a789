"""The same step in transformers + PEFT + bitsandbytes: Mixtral with all weights in NF4, resident.

`load_in_4bit` leaves a mixture's experts in bf16, which makes 8x7B a model of 90 GB. So they are
quantized here with bitsandbytes' own `replace_parameter_4bit`, layer by layer, and the model takes
27 GB: more than a card of 24 GB has. It runs without the cap.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch

from lamina.store.codec import import_bitsandbytes
from on_gpu.machine import GB, Machine


def build(config: dict[str, Any], machine: Machine) -> Any:
    """The model, quantized layer by layer so that one layer in bf16 is there at a time."""
    import bitsandbytes
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

    settings = {key: value for key, value in config.items() if key != "model_type"}
    layers = settings.pop("num_hidden_layers")
    full = MixtralConfig(**settings, num_hidden_layers=layers)
    full._attn_implementation = "sdpa"
    full._experts_implementation = "grouped_mm"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with machine.device:
            shell = MixtralConfig(**settings, num_hidden_layers=1)
            model = MixtralForCausalLM(shell)
            del model.model.layers[0]
            for number in range(layers):
                layer = MixtralDecoderLayer(full, number)
                for parameter in layer.parameters():
                    if parameter.dim() > 1:
                        parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
                attention = layer.self_attn
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    linear = getattr(attention, name)
                    quantized = bitsandbytes.nn.Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=False,
                        compute_dtype=torch.bfloat16,
                        quant_type="nf4",
                    )
                    quantized.weight = bitsandbytes.nn.Params4bit(
                        linear.weight.data, requires_grad=False, quant_type="nf4"
                    ).to(machine.device)
                    setattr(attention, name, quantized)
                for name in ("gate_up_proj", "down_proj"):
                    replace_parameter_4bit(layer.mlp.experts, name, quant_type="nf4")
                model.model.layers.append(layer)
            # Rotary frequencies are computed in fp32, whatever the default type.
            torch.set_default_dtype(torch.float32)
            model.model.rotary_emb = type(model.model.rotary_emb)(config=full)
    finally:
        torch.set_default_dtype(before)
    model.config = model.model.config = full
    return model


def measure(
    config: dict[str, Any], machine: Machine, *, tokens: int, length: int, micro: int
) -> None:
    """Prints a row.

    Args:
        micro: sequences in a micro-batch.
    """
    if import_bitsandbytes() is None:
        print("bitsandbytes can't be imported: no comparison (put its wheel into --wheels).")
        return
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = _measured(config, machine, tokens=tokens, length=length, micro=micro)
    print(f"\n{row}\n\n(made in {time.monotonic() - start:.0f} s, steps included)", flush=True)


def _measured(
    config: dict[str, Any], machine: Machine, *, tokens: int, length: int, micro: int
) -> str:
    from peft import LoraConfig, get_peft_model

    model = build(config, machine)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    vocab_size = int(config["vocab_size"])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (tokens // length, length), generator=generator)
    parts = ids.to(machine.device).split(micro)
    seconds, loss = 0.0, 0.0
    for _ in range(2):  # the first one warms up
        machine.forget_peak()
        machine.synchronize()
        start = time.monotonic()
        model.zero_grad(set_to_none=True)
        loss = 0.0
        for part in parts:
            out = model(input_ids=part, labels=part, use_cache=False)
            (out.loss / len(parts)).backward()
            loss += float(out.loss.detach()) / len(parts)
        machine.synchronize()
        seconds = time.monotonic() - start
    return (
        f"transformers + PEFT + bitsandbytes: {ids.numel():,} tokens a step in {len(parts)} "
        f"micro-batches, {seconds:.2f} s, **{ids.numel() / seconds:.0f} tok/s**, peak VRAM "
        f"{machine.peak() / GB:.1f} GB (resident, not capped), loss {loss:.3f}"
    )
