"""Generation by a transformers model, batch by batch, every request with its own settings and seed.

Requests are batched by prompt length; a row that finishes leaves its batch. The plan of batches follows
from the whole list of requests, so a resumed run computes the same numbers as an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from stages.engine.base import Completion, Request


class TransformersEngine:
    """Completes requests with `model` (a transformers or PEFT causal model, on any device)."""

    def __init__(self, model: Any, end_ids: Sequence[int], pad_id: int, batch: int) -> None:
        self.model = model
        self.end_ids = torch.tensor(sorted(set(end_ids)), device=model.device)
        self.pad_id = pad_id
        self.batch = batch

    def generate(
        self, requests: Iterable[Request], done: frozenset[str] = frozenset()
    ) -> Iterator[Completion]:
        """See `Engine.generate`. Same bytes for the same list of requests on the same kind of processor."""
        # Requests with one prompt lie side by side, so that they share its computation.
        planned = sorted(requests, key=lambda request: (len(request.prompt), request.prompt))
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(planned), self.batch):
                batch = planned[start : start + self.batch]
                # A batch partly done is computed whole, because its rows share the arithmetic.
                if any(request.id not in done for request in batch):
                    for completion in self._complete(batch):
                        if completion.id not in done:
                            yield completion
        finally:
            self.model.train(training)

    @torch.inference_mode()
    def _complete(self, batch: Sequence[Request]) -> Iterator[Completion]:
        device = self.model.device
        prompts = list(dict.fromkeys(request.prompt for request in batch))  # a shared prompt is read once
        width = max(map(len, prompts))
        step_ids = torch.full((len(prompts), width), self.pad_id, device=device)
        mask = torch.zeros((len(prompts), width), dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            step_ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
            mask[row, width - len(prompt) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        place = {prompt: row for row, prompt in enumerate(prompts)}
        spread = torch.tensor([place[request.prompt] for request in batch], device=device)
        draws = _Draws(batch, device)
        limits = torch.tensor([request.max_new_tokens for request in batch], device=device)
        tokens: list[list[int]] = [[] for _ in batch]
        logprobs = np.zeros(len(batch))
        rows = torch.arange(len(batch), device=device)  # the batch rows still going
        cache = DynamicCache()
        for step in range(int(limits.max())):
            output = self.model(
                input_ids=step_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits[:, -1].float()
            if step == 0:
                cache.batch_select_indices(spread)
                logits, mask, positions = logits[spread], mask[spread], positions[spread]
            chosen = draws.choose(logits, rows, step)
            chosen_logprob = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
            ended = torch.isin(chosen, self.end_ids)
            leaving = ended | (limits[rows] == step + 1)
            going = rows.tolist()
            for row, token, logprob, stop in zip(
                going, chosen.tolist(), chosen_logprob.tolist(), ended.tolist(), strict=True
            ):
                logprobs[row] += logprob
                if not stop:
                    tokens[row].append(token)
            if leaving.any():
                for row, stop, leaves in zip(going, ended.tolist(), leaving.tolist(), strict=True):
                    if leaves:
                        finish = "stop" if stop else "length"
                        yield Completion(batch[row].id, tuple(tokens[row]), finish, float(logprobs[row]))  # type: ignore[arg-type]
                stay = (~leaving).nonzero()[:, 0]
                if not len(stay):
                    return
                cache.batch_select_indices(stay)
                rows, chosen, mask, positions = rows[stay], chosen[stay], mask[stay], positions[stay]
            step_ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
            positions = positions[:, -1:] + 1


class _Draws:
    """Chooses the next token of each row: greedy, or by its own stream of uniform numbers."""

    def __init__(self, batch: Sequence[Request], device: torch.device) -> None:
        self.temperature = torch.tensor([request.temperature for request in batch], device=device)
        self.top_p = torch.tensor([request.top_p for request in batch], device=device)
        self.sampled = bool((self.temperature > 0).any())
        if self.sampled:
            limit = max(request.max_new_tokens for request in batch)
            streams = [
                np.random.Generator(np.random.Philox(request.seed)).random(limit, np.float32)
                for request in batch
            ]
            self.uniform = torch.from_numpy(np.stack(streams)).to(device)

    def choose(self, logits: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        """Token ids (rows,) from logits (rows, vocabulary); nucleus sampling by inverting the cumulative sum."""
        greedy = logits.argmax(-1)
        if not self.sampled:
            return greedy
        temperature = self.temperature[rows]
        scaled = logits / temperature.clamp(min=1e-6)[:, None]
        ranked, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
        cumulative = ranked.cumsum(-1)
        # The nucleus: tokens before the cumulative probability passes top_p, the one passing it included.
        kept = torch.where(cumulative - ranked < self.top_p[rows][:, None], ranked, 0.0).cumsum(-1)
        target = self.uniform[rows, step][:, None] * kept[:, -1:]
        place = (kept <= target).sum(-1, keepdim=True).clamp(max=kept.shape[-1] - 1)
        drawn = order.gather(1, place)[:, 0]
        return torch.where(temperature > 0, drawn, greedy)
