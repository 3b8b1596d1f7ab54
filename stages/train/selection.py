"""Keeps the checkpoint that answers validation problems best, if it is really better than where training started."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.policy.adapter import adapter_weights, read_adapter, save_adapter
from stages.policy.context import Model, base_context, refuse_long
from stages.policy.request import Engine, Request, request_seed
from stages.run.files import atomic_folder, atomic_write, read_json, read_jsonl, write_json
from stages.run.paths import VALID
from stages.run.stage import StageRun
from stages.stats.looks import judge
from stages.text.answers import read_answer, same_answer
from stages.text.prompts import prompt_ids


class Selection(TrainerCallback):
    """Has the policy answer validation problems while it trains, and keeps the best adapter.

    The score of a step is the mean of its greedy accuracy and its accuracy over samples, so that a few lucky greedy
    answers do not decide. Among equals the earliest step wins. Step 0, where training starts, is kept unless the best
    step is better by a paired test (stages/stats/looks.py). `section` names the parameters: "sft" or "dpo".
    `engine_of` makes an engine around a model in memory.
    """

    def __init__(
        self,
        run: StageRun,
        section: str,
        tokenizer: Any,
        config: dict[str, Any],
        engine_of: Callable[[Any], Engine],
    ) -> None:
        self.engine_of = engine_of
        self.run, self.tokenizer, self.config = run, tokenizer, config
        self.spec, self.prompt = getattr(run.params, section).select, run.params.prompt
        self.state = PartialState()
        self.rows_file = run.work / "selection.json"
        # Of each step: for each problem whether the greedy answer is right, and how many samples are.
        self.rows: dict[int, dict[str, Any]] = {}
        if self.rows_file.is_file():
            self.rows = {row["step"]: row for row in read_json(self.rows_file)}
        valid = read_jsonl(VALID, {"id": str, "question": str, "gold": str})
        self.problems = list(islice(valid, self.spec.questions))
        asked = Model(tokenizer, base_context(), self.prompt)
        limit = self.spec.max_new_tokens
        refuse_long(VALID, self.problems, [(None, None)], asked, f"{section}.select.max_new_tokens", limit)

    def train(self, trainer: Any, checkpoint: Path | None) -> None:
        """Train from `checkpoint` (None: the start), with looks at step 0, every `steps` steps and the last one."""
        self.consider(trainer.model, step=0)
        trainer.add_callback(self)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.consider(trainer.model, step=trainer.state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score the policy every `steps` optimizer steps."""
        if state.global_step % self.spec.steps == 0:
            self.consider(kwargs["model"], state.global_step)

    def consider(self, model: Any, step: int) -> None:
        """Score the adapter as it is now, and save it if it is better than every earlier step."""
        if step in self.rows:
            return
        row = {"step": step, **self._right(model)}
        best = max((sum(self._scores(one)) for one in self.rows.values()), default=-1)
        self.rows[step] = row
        if self.state.is_main_process:
            if sum(self._scores(row)) > best:
                with atomic_folder(self._folder(step)) as folder:
                    save_adapter(adapter_weights(model), self.config, folder)
            write_json(self.rows_file, [self.rows[key] for key in sorted(self.rows)])

    def write(self, adapter: Path, curve: Path, kept: Path, start: str) -> dict[str, Any]:
        """Write the adapter of the step that is kept, the curve, and why it is kept; returns the last.

        `start` names the policy of step 0.
        """
        scores = {step: self._scores(self.rows[step]) for step in sorted(self.rows)}
        judged = judge(scores, self._most, self.spec.level) | {"start": start}
        count, samples = len(self.problems), self.spec.samples
        with atomic_write(curve) as file:
            file.write("step,valid_accuracy,valid_mean,score\n")
            for step, values in scores.items():
                row = self.rows[step]
                accuracy = sum(row["greedy"]) / count
                mean = sum(row["drawn"]) / (count * samples) if samples else accuracy
                file.write(f"{step},{accuracy},{mean},{sum(values) / (count * self._most)}\n")
        write_json(kept, judged)
        with atomic_folder(adapter) as folder:
            save_adapter(read_adapter(self._folder(judged["kept"])), self.config, folder)
        return judged

    @property
    def _most(self) -> int:
        """The score of a problem whose answers are all right."""
        return 2 * self.spec.samples or 1

    def _scores(self, row: dict[str, Any]) -> list[int]:
        """Each problem's score: the greedy answer counts as much as all samples together."""
        weight = self.spec.samples or 1
        return [weight * greedy + drawn for greedy, drawn in zip(row["greedy"], row["drawn"], strict=True)]

    def _folder(self, step: int) -> Path:
        """Where the adapter of a step is saved while training goes on."""
        return self.run.work / "selected" / f"step-{step}"

    def _right(self, model: Any) -> dict[str, list[int]]:
        """Right greedy answers and samples of each problem; each process answers its share of the problems."""
        requests, asked = [], {}
        for place in range(self.state.process_index, len(self.problems), self.state.num_processes):
            problem = self.problems[place]
            prompt = tuple(prompt_ids(self.tokenizer, self.prompt, problem["question"]))
            for k in range(self.spec.samples + 1):
                seed = request_seed(self.run.params.seed, "select", problem["id"], str(k))
                temperature = 1.0 if k else 0.0
                request = Request(
                    f"{problem['id']}/{k}", prompt, self.spec.max_new_tokens, temperature, seed=seed
                )
                requests.append(request)
                asked[request.id] = (place, "drawn" if k else "greedy")
        right: list[tuple[int, str]] = []
        with torch.no_grad():
            for completion in self.engine_of(model).generate(requests):
                place, kind = asked[completion.id]
                problem = self.problems[place]
                written = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
                text = self.prompt.opening + written
                answer = read_answer(text, problem["question"]).answer
                if same_answer(answer, problem["gold"]):
                    right.append((place, kind))
        counts = {kind: [0] * len(self.problems) for kind in ("greedy", "drawn")}
        for place, kind in gather_object(right) if self.state.num_processes > 1 else right:
            counts[kind][place] += 1
        return counts
