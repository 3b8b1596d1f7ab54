"""Generation by a transformers model, batch by batch, every request with its own settings and seed.

Requests are batched by prompt length, and a finished row leaves its batch. The batches follow from the whole list of
requests, so a resumed run computes the same numbers as one that was never interrupted.

On a processor, a small model takes as many batches at once as it has threads, each computed by one thread: its matrices
are too small to be shared out. So the number of threads does not change what comes out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from stages.engine.handout import batches
from stages.policy.draw import Draws
from stages.policy.request import Completion, Request
from stages.run.errors import UserError
from stages.run.shortage import ran_out_of_memory

SMALL = 64 << 20  # bytes; a larger model's weights would be read from memory once for each batch
LEAVE_SHARE = 8  # finished rows leave their batch once they are one eighth of it


class TransformersEngine:
    """Completes requests with `model` (a transformers or PEFT causal model, on any device).

    `batch` is the number of requests in a batch, or a function of the longest prompt and limit that returns it.
    """

    def __init__(
        self, model: Any, end_ids: Sequence[int], pad_id: int, batch: int | Callable[[int, int], int]
    ) -> None:
        self.model = model
        self.end_ids = torch.tensor(sorted(set(end_ids)), device=model.device)
        self.pad_id = pad_id
        self.batch = batch
        self.most = 0  # the largest batch that is still tried after memory ran out; 0 while it has not

    def generate(
        self, requests: Iterable[Request], done: frozenset[str] = frozenset()
    ) -> Iterator[Completion]:
        """See `Engine.generate`. Same bytes for the same list of requests on the same kind of processor."""
        requests = list(requests)
        size = self.batch if isinstance(self.batch, int) else self.batch(*_longest(requests))
        # A batch partly done is computed whole, because its rows share the arithmetic.
        todo = [one for one in batches(requests, size) if any(request.id not in done for request in one)]
        training = self.model.training
        self.model.eval()
        try:
            small = self.model.device.type == "cpu" and self.model.get_memory_footprint() <= SMALL
            completions = self._side_by_side(todo) if small else self._in_turn(todo)
            yield from (one for one in completions if one.id not in done)
        finally:
            self.model.train(training)

    def _in_turn(self, todo: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        for batch in todo:
            yield from self._fitting(batch)

    def _side_by_side(self, todo: Sequence[Sequence[Request]]) -> Iterator[Completion]:
        """Complete several batches at once, one a thread."""
        count = torch.get_num_threads()
        waiting, results = iter(todo), SimpleQueue[Completion | BaseException | None]()
        lock, stopped = threading.Lock(), threading.Event()

        def work() -> None:
            torch.set_num_threads(1)  # for what this thread computes
            try:
                while not stopped.is_set():
                    with lock:
                        batch = next(waiting, None)
                    if batch is None:
                        break
                    for completion in self._fitting(batch):
                        results.put(completion)
                        if stopped.is_set():
                            break
                results.put(None)
            except BaseException as error:
                results.put(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(count, len(todo)))]
        try:
            for thread in threads:
                thread.start()
            working = len(threads)
            while working:
                one = results.get()
                if isinstance(one, BaseException):
                    raise one
                if one is None:
                    working -= 1
                else:
                    yield one
        finally:
            stopped.set()
            for thread in threads:
                thread.join()
            torch.set_num_threads(count)

    def _fitting(self, batch: Sequence[Request]) -> Iterator[Completion]:
        """Complete a batch. If it does not fit into memory, keep what is finished and do the rest in halves."""
        if (size := self.most) and len(batch) > size:
            for start in range(0, len(batch), size):
                yield from self._fitting(batch[start : start + size])
            return
        finished: set[str] = set()
        try:
            for completion in self._complete(batch):
                finished.add(completion.id)
                yield completion
            return
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise UserError(
                    f"out of memory with one row of up to {sum(_longest(batch)):,} tokens; lower max_new_tokens, "
                    "or use a larger GPU"
                ) from None
            self.most = (len(batch) + 1) // 2  # later batches have longer prompts
        torch.cuda.empty_cache()
        yield from self._fitting([request for request in batch if request.id not in finished])

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
        draws = Draws(batch, device)
        limits = torch.tensor([request.max_new_tokens for request in batch], device=device)
        tokens: list[list[int]] = [[] for _ in batch]
        logprobs = np.zeros(len(batch))
        rows = torch.arange(len(batch), device=device)  # the batch rows still going
        asleep = torch.zeros(len(batch), dtype=torch.bool, device=device)  # finished, not yet taken out
        steps = int(limits.max())
        cache = Cache(layer_class_to_replicate=partial(_RoomyLayer, width + steps))
        # The last token by its index, not as 1: that would be a view, for which torch copies the output layer's weights
        # once for each row (in bfloat16 on a processor; 12 seconds for 64 rows of SmolLM2).
        last = torch.tensor([-1], device=device)
        for step in range(steps):
            output = self.model(
                input_ids=step_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last,
            )
            logits = output.logits[:, -1].float()
            if step == 0:
                cache.batch_select_indices(spread)
                logits, mask, positions = logits[spread], mask[spread], positions[spread]
            chosen = draws.next_tokens(logits, rows, step)
            chosen_logprob = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
            ended = torch.isin(chosen, self.end_ids)
            finished = (ended | (limits[rows] == step + 1)) & ~asleep
            columns = (rows, chosen, chosen_logprob, ended, finished, asleep)
            going = zip(*(column.tolist() for column in columns), strict=True)
            for row, token, logprob, stop, last, slept in going:
                if slept:
                    continue
                logprobs[row] += logprob
                if not stop:
                    tokens[row].append(token)
                if last:
                    yield Completion(
                        batch[row].id, tuple(tokens[row]), "stop" if stop else "length", float(logprobs[row])
                    )
            asleep |= finished
            gone = int(asleep.sum())
            if gone == len(rows):
                return
            # Removing rows copies the whole cache, so it is not done for every single row.
            if gone * LEAVE_SHARE >= len(rows):
                stay = (~asleep).nonzero()[:, 0]
                cache.batch_select_indices(stay)
                rows, chosen, mask, positions = rows[stay], chosen[stay], mask[stay], positions[stay]
                asleep = asleep[stay]
            step_ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
            positions = positions[:, -1:] + 1


def _longest(requests: Sequence[Request]) -> tuple[int, int]:
    """Tokens of the longest prompt, and the highest limit."""
    prompt = max((len(request.prompt) for request in requests), default=1)
    return prompt, max((request.max_new_tokens for request in requests), default=1)


class _RoomyLayer(DynamicLayer):
    """A cache layer with spare room, so that a new token is written in place and earlier ones are not copied.

    When the room is used up it doubles, up to `most` tokens: so each token is copied about once. The prompts get none,
    because reading them takes the most memory.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add states (rows, heads, new tokens, head size); returns all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.key_store, self.value_store = key_states[..., :0, :], value_states[..., :0, :]
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if after > self.key_store.shape[-2]:
            room = max(after, min(2 * after, self.most)) if before else after
            self.key_store = _moved(self.key_store, before, room)
            self.value_store = _moved(self.value_store, before, room)
        self.key_store[..., before:after, :] = key_states
        self.value_store[..., before:after, :] = value_states
        return self._show(after)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order (a row may be named more than once)."""
        self.key_store, self.value_store = self.key_store[indices], self.value_store[indices]
        self._show(self.get_seq_length())

    def _show(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = self.key_store[..., :length, :], self.value_store[..., :length, :]
        return self.keys, self.values


def _moved(store: torch.Tensor, length: int, room: int) -> torch.Tensor:
    """The first `length` tokens of a store in one that has room for `room`."""
    larger = store.new_empty((*store.shape[:-2], room, store.shape[-1]))
    larger[..., :length, :] = store[..., :length, :]
    return larger
