"""Keeps the DPO checkpoint that answers validation problems best."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.policy.adapter import adapter_weights, save_adapter
from stages.policy.context import Model, base_context, refuse_long
from stages.policy.request import Engine, Request, request_seed
from stages.run.files import atomic_folder, atomic_write, read_json, read_jsonl, write_json
from stages.run.paths import VALID
from stages.run.stage import StageRun
from stages.text.answers import read_answer, same_answer
from stages.text.prompts import prompt_ids


class Selection(TrainerCallback):
    """Has the policy answer validation problems while it trains, and keeps the best adapter.

    The score of a step is the mean of its greedy accuracy and its accuracy over samples, so that a few lucky greedy
    answers do not decide. Among equals the earliest step wins. `engine_of` makes an engine around a model in memory.
    """

    def __init__(
        self, run: StageRun, tokenizer: Any, config: dict[str, Any], engine_of: Callable[[Any], Engine]
    ) -> None:
        self.engine_of = engine_of
        self.run, self.tokenizer, self.config = run, tokenizer, config
        self.spec, self.prompt = run.params.dpo, run.params.prompt
        self.state = PartialState()
        self.rows_file = run.work / "selection.json"
        self.rows: dict[int, dict[str, Any]] = {}
        if self.rows_file.is_file():
            self.rows = {row["step"]: row for row in read_json(self.rows_file)}
        valid = read_jsonl(VALID, {"id": str, "question": str, "gold": str})
        self.problems = list(islice(valid, self.spec.select_questions))
        asked = Model(tokenizer, base_context(), self.prompt)
        limit = self.spec.select_max_new_tokens
        refuse_long(VALID, self.problems, [(None, None)], asked, "dpo.select_max_new_tokens", limit)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score the policy every `select_steps` optimizer steps."""
        if state.global_step % self.spec.select_steps == 0:
            self.consider(kwargs["model"], state.global_step)

    def consider(self, model: Any, step: int) -> None:
        """Score the adapter as it is now, and save it if it is better than every earlier step."""
        if step in self.rows:
            return
        row = {"step": step, **self._score(model)}
        best = self.best()
        self.rows[step] = row
        if self.state.is_main_process:
            if best is None or row["score"] > best["score"]:
                with atomic_folder(self.folder(step)) as folder:
                    save_adapter(adapter_weights(model), self.config, folder)
            write_json(self.rows_file, [self.rows[key] for key in sorted(self.rows)])

    def best(self) -> dict[str, Any] | None:
        """The best row so far; the earliest among equals."""
        return max(self.rows.values(), key=lambda row: (row["score"], -row["step"]), default=None)

    def folder(self, step: int) -> Path:
        """Where the adapter of a step is saved while training goes on."""
        return self.run.work / "selected" / f"step-{step}"

    def write(self, path: Path) -> dict[str, Any]:
        """Write the curve; returns the best row."""
        best = self.best()
        assert best is not None, "step 0 is always considered"
        with atomic_write(path) as file:
            file.write("step,valid_accuracy,valid_mean,score\n")
            for step in sorted(self.rows):
                row = self.rows[step]
                file.write(f"{step},{row['accuracy']},{row['mean']},{row['score']}\n")
        return best

    def _score(self, model: Any) -> dict[str, float]:
        """Accuracy of greedy answers and of samples; each process answers its share of the problems."""
        requests, golds = [], {}
        for problem in self.problems[self.state.process_index :: self.state.num_processes]:
            prompt = tuple(prompt_ids(self.tokenizer, self.prompt, problem["question"]))
            for k in range(self.spec.select_samples + 1):
                seed = request_seed(self.run.params.seed, "select", problem["id"], str(k))
                temperature = 1.0 if k else 0.0
                request = Request(
                    f"{problem['id']}/{k}", prompt, self.spec.select_max_new_tokens, temperature, seed=seed
                )
                requests.append(request)
                golds[request.id] = problem
        right: list[tuple[bool, bool]] = []  # (greedy?, correct?)
        with torch.no_grad():
            for completion in self.engine_of(model).generate(requests):
                problem = golds[completion.id]
                written = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
                text = self.prompt.opening + written
                answer = read_answer(text, problem["question"]).answer
                right.append((completion.id.endswith("/0"), same_answer(answer, problem["gold"])))
        everyone = gather_object(right) if self.state.num_processes > 1 else right
        greedy = [correct for is_greedy, correct in everyone if is_greedy]
        drawn = [correct for is_greedy, correct in everyone if not is_greedy]
        accuracy = sum(greedy) / len(greedy)
        mean = sum(drawn) / len(drawn) if drawn else accuracy
        return {"accuracy": accuracy, "mean": mean, "score": (accuracy + mean) / 2}
