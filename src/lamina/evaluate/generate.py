"""Text from a model, with or without its adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from lamina.engine.decode import Decoder
from lamina.engine.prepare import Progress
from lamina.evaluate.source import open_tuned
from lamina.models.common import CachedAttention

#: Told of each piece of text as it comes: the conversation's place, and the text.
OnToken = Callable[[int, str], None]


@dataclass(frozen=True)
class Completion:
    """One answer.

    Args:
        text: without the token that ended it.
        token_ids: with it.
        prompt_tokens: length of the rendered conversation.
        finish_reason: `stop` if the model ended its turn, `length` if it ran out of tokens.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class GenerateStats:
    """Of the last `generate`.

    Args:
        tokens: generated, over all conversations.
        seconds: in all, the prompts included.
        bytes_read: from the store.
        bytes_per_token: read a generated token, the prompts' pass left out.
        tokens_per_second: generated tokens over the seconds after the prompts' pass.
    """

    tokens: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_per_token: int = 0
    tokens_per_second: float = 0.0


class Generator:
    """Answers conversations. A context manager; its weights stay in memory between calls.

    Args:
        run_or_model: a run's folder, a store's folder, or a model's name.
        adapter: False for the base model of a run.

    Raises:
        LaminaError: it can't be opened.
    """

    def __init__(
        self, run_or_model: str | Path, *, adapter: bool = True, progress: Progress | None = None
    ):
        tuned = open_tuned(run_or_model, adapter=adapter, progress=progress)
        self._model = tuned.model
        self._decoder = Decoder(tuned.model, tuned.adapter)
        self.stats = GenerateStats()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._decoder.__exit__(kind, error, traceback)

    def generate(
        self,
        conversations: Sequence[Sequence[dict[str, Any]]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """Answer conversations, all of them in each pass over the blocks.

        Args:
            conversations: for each, messages with `role` and `content`; the last is to be answered.
            temperature: 0 takes the likeliest token.
            top_p: sample among the likeliest tokens that together have this probability.
            on_token: told of text as it comes.

        Raises:
            DataError: a conversation can't be rendered.
        """
        renderer = self._model.renderer
        prompts = [renderer.prompt(list(messages)) for messages in conversations]
        if not prompts or max_new_tokens < 1:
            return []
        sampler = _Sampler(temperature, top_p, seed)
        writers = [_Writer(self._model.tokenizer, place, on_token) for place in range(len(prompts))]
        answers: list[list[int]] = [[] for _ in prompts]
        stopped = [False] * len(prompts)
        longest = max(len(prompt) for prompt in prompts) + max_new_tokens
        cache = CachedAttention([len(prompt) for prompt in prompts], longest, self._model.device)
        self._decoder.source.take_stats()
        start = time.monotonic()

        alive = list(range(len(prompts)))
        ids_T = torch.tensor([token for prompt in prompts for token in prompt])
        prompt_seconds, prompt_bytes, passes = 0.0, 0, 0
        while alive:
            logits_NV = self._decoder.next_logits(ids_T, cache)
            if not passes:
                prompt_seconds = time.monotonic() - start
                prompt_bytes = self._decoder.source.take_stats().bytes_read
            passes += 1
            chosen = sampler(logits_NV).tolist()
            going = []
            for row, (place, token) in enumerate(zip(alive, chosen, strict=True)):
                answers[place].append(token)
                if token in renderer.stop_ids:
                    stopped[place] = True
                    continue
                writers[place].write(answers[place])
                if len(answers[place]) < max_new_tokens:
                    going.append(row)
            if 0 < len(going) < len(alive):
                cache.keep(going)
            ids_T = torch.tensor([chosen[row] for row in going])
            alive = [alive[row] for row in going]

        tokens = sum(len(answer) for answer in answers)
        seconds = time.monotonic() - start
        later_bytes = self._decoder.source.take_stats().bytes_read
        later_tokens = tokens - len(prompts)
        self.stats = GenerateStats(
            tokens=tokens,
            seconds=seconds,
            bytes_read=prompt_bytes + later_bytes,
            bytes_per_token=later_bytes // later_tokens if later_tokens else 0,
            tokens_per_second=later_tokens / (seconds - prompt_seconds) if later_tokens else 0.0,
        )
        return [
            Completion(
                text=writer.finish(answer[:-1] if stop else answer),
                token_ids=answer,
                prompt_tokens=len(prompt),
                finish_reason="stop" if stop else "length",
            )
            for writer, answer, stop, prompt in zip(writers, answers, stopped, prompts, strict=True)
        ]


def generate(
    run_or_model: str | Path,
    conversations: Sequence[Sequence[dict[str, Any]]],
    *,
    adapter: bool = True,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[Completion]:
    """Answer conversations once: a `Generator` that is opened and closed again.

    Raises:
        LaminaError: the model can't be opened, or a conversation can't be rendered.
    """
    with Generator(run_or_model, adapter=adapter) as generator:
        return generator.generate(
            conversations,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )


class _Sampler:
    """Chooses tokens `[N]` from logits `[N, V]`."""

    def __init__(self, temperature: float, top_p: float, seed: int):
        self._temperature = temperature
        self._top_p = top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits_NV: Tensor) -> Tensor:
        if self._temperature <= 0:
            return logits_NV.argmax(-1)
        probs_NV = torch.softmax(logits_NV.cpu() / self._temperature, dim=-1)
        sorted_NV, order_NV = probs_NV.sort(dim=-1, descending=True)
        # A token stays if those before it don't have top_p yet: the first always does.
        before_NV = sorted_NV.cumsum(-1) - sorted_NV
        sorted_NV = torch.where(before_NV < self._top_p, sorted_NV, 0.0)
        picked_N1 = torch.multinomial(sorted_NV, 1, generator=self._generator)
        return order_NV.gather(1, picked_N1).squeeze(1)


class _Writer:
    """Hands out an answer's text as it grows, a whole character at a time."""

    def __init__(self, tokenizer: Any, place: int, on_token: OnToken | None):
        self._tokenizer = tokenizer
        self._place = place
        self._on_token = on_token
        self._written = ""

    def _decoded(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def write(self, token_ids: list[int]) -> None:
        if self._on_token is None:
            return
        text = self._decoded(token_ids)
        # A character of several tokens shows as a replacement mark until its last one.
        if text.endswith("\ufffd") or not text.startswith(self._written):
            return
        if len(text) > len(self._written):
            self._on_token(self._place, text[len(self._written) :])
            self._written = text

    def finish(self, token_ids: list[int]) -> str:
        text = self._decoded(token_ids)
        rest = text[len(self._written) :]
        if self._on_token is not None and rest and text.startswith(self._written):
            self._on_token(self._place, rest)
        return text
