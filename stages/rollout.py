"""Rollouts: the SFT policy answers training questions in several ways, each an arm.

A record of data/rollouts.jsonl:

    {"id": "train-00017", "question": "...", "gold": "10", "solution": "... #### 10", "trajectories":
     [{"id": "train-00017/0", "arm": "plain-cool", "style": "plain", "text": "... #### 10", "tokens": 41,
       "logprob": -3.1, "finish": "stop", "seed": 12345}]}
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.core.answers import read_answer, same_answer
from stages.core.generation import complete
from stages.core.launch import fix_arithmetic
from stages.core.params import Arm, Rollout
from stages.core.paths import BASE, SFT_ADAPTER
from stages.core.policy import load_tokenizer
from stages.core.prompts import prompt_ids
from stages.core.records import read_jsonl, write_jsonl
from stages.core.stage import StageRun, stage_run
from stages.engine.base import Request, request_seed
from stages.engine.choose import open_engine
from stages.regime_w.bandit import Pull, Thompson, uniform

TRAIN = Path("data/gsm8k/train.jsonl")
ROLLOUTS = Path("data/rollouts.jsonl")


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
        problems = choose(
            list(read_jsonl(TRAIN, {"id": str, "question": str, "gold": str})), spec.questions, seed
        )
        tokenizer = load_tokenizer()

        # Questions go in rounds; what a round showed decides which arms the next one pulls (thompson).
        arms = list(spec.arms)
        bandit = (
            Thompson(arms, spec.per_question, spec.floor, seed) if spec.allocation == "thompson" else None
        )
        size = spec.round_questions if bandit else len(problems)
        records = []
        total = len(problems) * spec.per_question
        with (
            run.journal() as journal,
            open_engine(SFT_ADAPTER, run.params.hardware) as engine,
            run.progress("generating", total, "trajectories", len(journal.records)) as advance,
        ):
            for start in range(0, len(problems), size):
                batch = problems[start : start + size]
                pulls = {
                    problem["id"]: bandit.choose(start // size, problem["id"])
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
                made = [build_record(problem, pulls[problem["id"]], spec, drawn, seeds) for problem in batch]
                if bandit:
                    bandit.learn([_verdicts(record) for record in made])
                records += made

        write_jsonl(ROLLOUTS, records)
        stopped = [one["finish"] == "stop" for record in records for one in record["trajectories"]]
        ended = sum(stopped) / len(stopped)
        run.say(f"{len(records):,} questions, {len(stopped):,} trajectories, {ended:.1%} ended by themselves")


def choose(problems: list[dict[str, Any]], count: int | None, seed: int) -> list[dict[str, Any]]:
    """`count` of the problems (all when None), drawn by seed, in their own order."""
    if count is None or count >= len(problems):
        return problems
    places = sorted(random.Random(f"{seed}/rollout").sample(range(len(problems)), count))
    return [problems[place] for place in places]


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
