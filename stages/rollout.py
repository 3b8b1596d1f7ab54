"""Rollouts: the policy that a round starts from answers training questions in several ways. Each way to ask is an arm.

A record of data/rollouts/<round>.jsonl:

    {"id": "train-00017", "question": "...", "gold": "10", "solution": "... #### 10", "trajectories":
     [{"id": "train-00017/0", "arm": "plain-cool", "style": "plain", "text": "... #### 10", "tokens": 41,
       "logprob": -3.1, "finish": "stop", "seed": 12345}]}
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from stages.engine.open import open_engine
from stages.policy.adapter import load_tokenizer
from stages.policy.complete import complete
from stages.policy.context import Model, base_context, refuse_long
from stages.policy.questions import pick_questions
from stages.policy.request import Request, rollout_seed
from stages.regime_w.bandit import Pull, Thompson, Uniform
from stages.run.files import join_files, read_jsonl, write_jsonl
from stages.run.params import Arm, load_params
from stages.run.paths import BASE, TRAIN, RoundPaths
from stages.run.process import fix_arithmetic
from stages.run.stage import StageRun, stage_run
from stages.text.answers import read_answer, same_answer
from stages.text.prompts import prompt_ids

BATCH = 2048  # questions of a batch with uniform pulls; the size does not matter there
Record = dict[str, Any]


def main(round_name: str) -> None:
    """Draw the trajectories of all questions of a round."""
    start, rollouts = Path(load_params().rounds[round_name].start), RoundPaths(round_name).rollouts
    with stage_run(
        "rollout",
        variant=round_name,
        sections=("rollout", "prompt", "rounds.${key}.rollout", "seed"),
        inputs=[TRAIN, BASE, start],
        outputs=[rollouts],
    ) as run:
        spec, seed, arms = run.params.rollout, run.params.seed, list(run.params.rollout.arms)
        fix_arithmetic(run.params.hardware.threads, seed)
        counts = [one.questions for one in run.params.so_far("rollout")]
        picked = pick_questions(sum(1 for _ in read_jsonl(TRAIN)), counts, seed)

        # Questions go in batches. Each finished batch is a file of its own, so that memory does not grow with the
        # number of questions. With thompson, a batch's verdicts decide which arms the next one pulls.
        bandit: Thompson | Uniform
        if spec.allocation == "thompson":
            own_seed = f"{seed}/{run.params.later}" if run.params.later else seed
            bandit, size = Thompson(arms, spec.per_question, spec.floor, own_seed), spec.round_questions
        else:
            bandit, size = Uniform(arms, spec.per_question), BATCH
        batches = [run.work / f"batch-{number:05d}.jsonl" for number in range(math.ceil(len(picked) / size))]
        total = len(picked) * spec.per_question
        finished = min(len(picked), sum(path.is_file() for path in batches) * size) * spec.per_question

        # Generation, journalled.
        tokenizer, problems = load_tokenizer(), problems_at(picked)
        model = Model(tokenizer, base_context(), run.params.prompt)
        ways = [(arm.style, arm.system) for arm in spec.arms.values()]
        refuse_long(TRAIN, problems_at(picked), ways, model, "rollout.max_new_tokens", spec.max_new_tokens)
        with (
            run.journal() as journal,
            open_engine(start, run.params.hardware) as engine,
            run.progress("generating", total, "trajectories", finished + len(journal.records)) as advance,
        ):
            for number, path in enumerate(batches):
                batch = list(islice(problems, size))
                if not path.is_file():
                    pulls = {problem["id"]: bandit.choose(number, problem["id"]) for problem in batch}
                    requests = {
                        problem["id"]: build_requests(run, tokenizer, problem, pulls[problem["id"]])
                        for problem in batch
                    }
                    asked = [request for group in requests.values() for request in group]
                    drawn = complete(engine, tokenizer, asked, journal, advance, run.params.prompt.opening)
                    records = (
                        build_record(run, one, pulls[one["id"]], requests[one["id"]], drawn) for one in batch
                    )
                    write_jsonl(path, records)
                    journal.clear()
                bandit.learn(map(verdicts, read_jsonl(path)))

        join_files(batches, rollouts)
        run.finish(f"{len(picked):,} questions, {total:,} trajectories")


def problems_at(places: Sequence[int]) -> Iterator[Record]:
    """The training problems at these places of the file."""
    wanted = set(places)
    rows = read_jsonl(TRAIN, {"id": str, "question": str, "gold": str})
    return (problem for place, problem in enumerate(rows) if place in wanted)


def build_requests(run: StageRun, tokenizer: Any, problem: Record, pulls: Sequence[Pull]) -> list[Request]:
    """One request for each pull of a question; its seed follows from the run's seed, the question and the pull."""
    spec, seed = run.params.rollout, run.params.seed
    prompts: dict[tuple[str, str | None], tuple[int, ...]] = {}  # arms may share a prompt
    requests = []
    for place, pull in enumerate(pulls):
        arm: Arm = spec.arms[pull.arm]
        asked = (arm.style, arm.system)
        if asked not in prompts:
            prompts[asked] = tuple(prompt_ids(tokenizer, run.params.prompt, problem["question"], *asked))
        own_seed = rollout_seed(seed, run.params.later, problem["id"], str(place))
        name = f"{problem['id']}/{place}"
        requests.append(
            Request(name, prompts[asked], spec.max_new_tokens, arm.temperature, arm.top_p, own_seed)
        )
    return requests


def build_record(
    run: StageRun,
    problem: Record,
    pulls: Sequence[Pull],
    requests: Sequence[Request],
    drawn: dict[str, Record],
) -> Record:
    """The record of one question, with its trajectories in the order of the pulls."""
    spec = run.params.rollout
    trajectories = []
    for pull, request in zip(pulls, requests, strict=True):
        one = drawn[request.id]
        trajectory = {"id": one["id"], "arm": pull.arm, "style": spec.arms[pull.arm].style}
        trajectory |= {key: one[key] for key in ("text", "tokens", "logprob", "finish")}
        trajectory["seed"] = request.seed
        if spec.allocation == "thompson":
            trajectory |= {"propensity": pull.propensity, "uniform": pull.uniform}
        trajectories.append(trajectory)
    question = {"id": problem["id"], "question": problem["question"], "gold": problem["gold"]}
    planted = {"planted": True} if problem.get("planted") else {}
    return {**question, "solution": problem["solution"], **planted, "trajectories": trajectories}


def verdicts(record: Record) -> list[tuple[str, bool]]:
    """The arm and the verdict of each trajectory of a question."""
    return [
        (one["arm"], same_answer(read_answer(one["text"], record["question"]).answer, record["gold"]))
        for one in record["trajectories"]
    ]
