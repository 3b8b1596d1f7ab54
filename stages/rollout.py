"""Rollouts: the SFT policy answers training questions in several ways, each an arm.

A record of data/rollouts.jsonl:

    {"id": "train-00017", "question": "...", "gold": "10", "solution": "... #### 10", "trajectories":
     [{"id": "train-00017/0", "arm": "plain-cool", "style": "plain", "text": "... #### 10", "tokens": 41,
       "logprob": -3.1, "finish": "stop", "seed": 12345}]}
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from stages.core.answers import read_answer, same_answer
from stages.core.generation import complete
from stages.core.launch import fix_arithmetic
from stages.core.params import Arm, Rollout
from stages.core.paths import BASE, SFT_ADAPTER
from stages.core.policy import load_tokenizer
from stages.core.prompts import prompt_ids
from stages.core.records import Journal, atomic_write, read_jsonl, write_jsonl
from stages.core.stage import StageRun, stage_run
from stages.engine.base import Request, request_seed
from stages.engine.choose import open_engine
from stages.regime_w.bandit import Pull, Thompson, uniform

TRAIN = Path("data/gsm8k/train.jsonl")
ROLLOUTS = Path("data/rollouts.jsonl")
ROUND = 2048  # questions a round, where the rounds do not matter (uniform)


def main() -> None:
    """Draw the trajectories of all chosen questions."""
    with stage_run(
        "rollout",
        sections=("rollout", "prompt", "seed"),
        inputs=[TRAIN, BASE, SFT_ADAPTER],
        outputs=[ROLLOUTS],
    ) as run:
        spec, seed = run.params.rollout, run.params.seed
        fix_arithmetic(run.params.hardware.threads, seed)
        chosen = choose(sum(1 for _ in read_jsonl(TRAIN)), spec.questions, seed)
        tokenizer = load_tokenizer()

        # Questions go in rounds, so that memory does not grow with them; a finished round is a part on the disk.
        # What a round showed decides which arms the next one pulls (thompson).
        arms = list(spec.arms)
        bandit = (
            Thompson(arms, spec.per_question, spec.floor, seed) if spec.allocation == "thompson" else None
        )
        size = spec.round_questions if bandit else ROUND
        parts = [run.work / f"part-{number:05d}.jsonl" for number in range(math.ceil(len(chosen) / size))]
        total = len(chosen) * spec.per_question
        done = sum(part.is_file() for part in parts) * size * spec.per_question
        with (
            run.journal() as journal,
            open_engine(SFT_ADAPTER, run.params.hardware) as engine,
            run.progress(
                "generating", total, "trajectories", min(total, done + len(journal.records))
            ) as advance,
        ):
            problems = iter_chosen(chosen)
            for number, part in enumerate(parts):
                batch = list(islice(problems, size))
                if not part.is_file():
                    if not _begun(journal, batch, spec.per_question):
                        journal.clear()  # what it holds is in the parts before
                    pulls = {
                        problem["id"]: bandit.choose(number, problem["id"])
                        if bandit
                        else uniform(arms, spec.per_question)
                        for problem in batch
                    }
                    requests = []
                    for problem in batch:
                        prompts: dict[tuple[str, str | None], tuple[int, ...]] = {}
                        requests += [
                            build_request(run, tokenizer, problem, place, spec.arms[pull.arm], prompts)
                            for place, pull in enumerate(pulls[problem["id"]])
                        ]
                    drawn = complete(engine, tokenizer, requests, journal, advance, run.params.prompt.opening)
                    seeds = {request.id: request.seed for request in requests}
                    made = [
                        build_record(problem, pulls[problem["id"]], spec, drawn, seeds) for problem in batch
                    ]
                    write_jsonl(part, made)
                if bandit:
                    bandit.learn([_verdicts(record) for record in read_jsonl(part)])

        ended = join(parts)
        run.say(f"{len(chosen):,} questions, {total:,} trajectories, {ended / total:.1%} ended by themselves")


def choose(size: int, count: int | None, seed: int) -> Sequence[int]:
    """The places of `count` of `size` problems (all when None), drawn by seed, in order."""
    if count is None or count >= size:
        return range(size)
    return sorted(random.Random(f"{seed}/rollout").sample(range(size), count))


def iter_chosen(places: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The training problems at these places of the file."""
    wanted = iter(places)
    place = next(wanted, None)
    for number, problem in enumerate(read_jsonl(TRAIN, {"id": str, "question": str, "gold": str})):
        if number == place:
            yield problem
            place = next(wanted, None)


def join(parts: Sequence[Path]) -> int:
    """Write all parts to the output; returns how many trajectories ended by themselves."""
    ended = 0
    with atomic_write(ROLLOUTS) as out:
        for part in parts:
            with part.open(encoding="utf-8") as lines:
                for line in lines:
                    ended += sum(one["finish"] == "stop" for one in json.loads(line)["trajectories"])
                    out.write(line)
    return ended


def _begun(journal: Journal, batch: Sequence[dict[str, Any]], pulls: int) -> bool:
    """Whether the journal holds a trajectory of this round."""
    return any(f"{problem['id']}/{pull}" in journal.records for problem in batch for pull in range(pulls))


def build_request(
    run: StageRun,
    tokenizer: Any,
    problem: dict[str, Any],
    pull: int,
    arm: Arm,
    prompts: dict[tuple[str, str | None], tuple[int, ...]],
) -> Request:
    """The request of one pull; its seed follows from the run's seed, the question and the pull.

    `prompts` holds the question's prompts so far, by style and system line: arms that share them share it.
    """
    way = (arm.style, arm.system)
    if way not in prompts:
        prompts[way] = tuple(prompt_ids(tokenizer, run.params.prompt, problem["question"], *way))
    seed = request_seed(run.params.seed, "rollout", problem["id"], str(pull))
    identity = f"{problem['id']}/{pull}"
    limit = run.params.rollout.max_new_tokens
    return Request(identity, prompts[way], limit, arm.temperature, arm.top_p, seed)


def build_record(
    problem: dict[str, Any],
    pulls: Sequence[Pull],
    spec: Rollout,
    drawn: dict[str, dict[str, Any]],
    seeds: dict[str, int],
) -> dict[str, Any]:
    """The record of one question with its trajectories in the order of the pulls."""
    trajectories = []
    for place, pull in enumerate(pulls):
        one = drawn[f"{problem['id']}/{place}"]
        trajectory = {
            "id": one["id"],
            "arm": pull.arm,
            "style": spec.arms[pull.arm].style,
            "text": one["text"],
            "tokens": one["tokens"],
            "logprob": one["logprob"],
            "finish": one["finish"],
            "seed": seeds[one["id"]],
        }
        if spec.allocation == "thompson":
            trajectory |= {"propensity": pull.propensity, "uniform": pull.uniform}
        trajectories.append(trajectory)
    planted = {"planted": True} if problem.get("planted") else {}
    return {
        "id": problem["id"],
        "question": problem["question"],
        "gold": problem["gold"],
        "solution": problem["answer"],
        **planted,
        "trajectories": trajectories,
    }


def _verdicts(record: dict[str, Any]) -> list[tuple[str, bool]]:
    return [
        (one["arm"], same_answer(read_answer(one["text"], record["question"]).answer, record["gold"]))
        for one in record["trajectories"]
    ]
