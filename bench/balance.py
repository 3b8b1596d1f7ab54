"""How long an optimizer step waits for its slowest GPU, when GPUs share a global batch: a simulation, a second long.

    python bench/balance.py

A pass costs its rows times its longest row: padding is computed too. The passes of a GPU follow each other, and a step
ends when the last GPU has done its own. The ideal step has no padding and keeps all GPUs equally long: all tokens,
divided by the GPUs. Columns are times of that ideal. "Equal rows" is what the stages did before: rows sorted by length,
equally many in each pass, dealt out in turn, so that the last GPU always got the longest. "Equal tokens" is what they
do (stages/train/trainer.py, BalancedTokens). "Padding-free" is what would be left of it if no padding were computed
(bench/padding_free.py) and passes were cut by the tokens of whole pairs. Lengths are those of bench/gpu.py, rows and
batches those of profiles/abel-7b.yaml; a pair costs twice its longer side.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from common import change, make_workplace, new_parser, print_table
from gpu import ANSWER_TOKENS, draw_length

from stages.launch.devices import micro_batch, training_processes
from stages.launch.memory import SEQUENCES
from stages.run.params import Params, load_params
from stages.train.trainer import LENGTH, BalancedTokens, training_order

ROWS, SEED = 4_000, 17
GPUS = (1, 2, 4, 8)
HEAD = ["", "GPUs", "rows a pass", "equal rows", "equal tokens", "of it padding", "padding-free"]


def main() -> None:
    """Simulate SFT and DPO on each number of GPUs and print the table."""
    new_parser(__doc__).parse_args()
    print_table(HEAD, table())


def table() -> Iterator[list[str]]:
    """The rows of the table."""
    batches = {"SFT": abel().sft.batch, "DPO": abel().dpo.batch}
    for phase, batch in batches.items():
        places, tokens = draw_rows(phase)
        order = training_order(ROWS, batch, 1, SEED)
        places, tokens = [places[at] for at in order], [tokens[at] for at in order]
        for gpus in GPUS:
            processes = training_processes(gpus, batch)
            rows = micro_batch(batch, processes, SEQUENCES if phase == "SFT" else SEQUENCES // 2)
            ideal = sum(tokens) / processes
            passes = batch // (rows * processes)
            before = steps(equal_rows(places, batch, processes, rows), padded(places), passes)
            after = steps(equal_tokens(places, batch, processes, rows), padded(places), passes)
            free = steps(equal_tokens(tokens, batch, processes, rows), real(tokens), passes)
            padding = 1 - sum(tokens) / sum(map(sum, after))
            taken = [f"{sum(map(max, zip(*one, strict=True))) / ideal:.2f}" for one in (before, after, free)]
            yield [phase, str(gpus), str(rows), *taken[:2], f"{padding:.0%}", taken[2]]


def abel() -> Params:
    """The parameters of profiles/abel-7b.yaml."""
    with tempfile.TemporaryDirectory() as folder:
        place = make_workplace(Path(folder) / "place")
        change(place / "params.yaml", ["profile=abel-7b"])
        return load_params(place)


def draw_rows(phase: str) -> tuple[list[int], list[int]]:
    """What each row costs in a pass, per row of that pass, and its tokens."""
    rng, places, tokens = random.Random(SEED), [], []
    for _ in range(ROWS):
        prompt = draw_length(rng, "prompt")
        if phase == "SFT":
            answers = [draw_length(rng, "answer")]
        else:
            answers = [draw_length(rng, "answer", ANSWER_TOKENS) for _ in range(2)]
        places.append(len(answers) * (prompt + max(answers)))
        tokens.append(len(answers) * prompt + sum(answers))
    return places, tokens


def equal_rows(lengths: list[int], batch: int, processes: int, rows: int) -> list[list[list[int]]]:
    """For each process its passes, as indices: sorted rows, dealt out in turn."""
    passes: list[list[int]] = []
    for start in range(0, len(lengths), batch):
        ordered = sorted(range(start, start + batch), key=lengths.__getitem__)
        passes += [ordered[at : at + rows] for at in range(0, batch, rows)]
    return [passes[process::processes] for process in range(processes)]


def equal_tokens(lengths: list[int], batch: int, processes: int, rows: int) -> list[list[list[int]]]:
    """The same as the stages' trainers cut them."""
    made = []
    for process in range(processes):
        arguments = SimpleNamespace(
            gradient_accumulation_steps=batch // (rows * processes), world_size=processes, process_index=process,
            train_batch_size=rows,
        )  # fmt: skip
        trainer = SimpleNamespace(args=arguments, train_dataset={LENGTH: lengths})
        made.append(list(BalancedTokens._get_train_sampler(trainer)))  # type: ignore[arg-type]
    return made


def padded(lengths: list[int]) -> Callable[[list[int]], int]:
    """What a pass costs when its rows are padded to the longest."""
    return lambda one: len(one) * max(lengths[at] for at in one)


def real(lengths: list[int]) -> Callable[[list[int]], int]:
    """What a pass costs without padding."""
    return lambda one: sum(lengths[at] for at in one)


def steps(passes: list[list[list[int]]], price: Callable[[list[int]], int], count: int) -> list[list[int]]:
    """For each process what each of its steps costs, of `count` passes each."""
    cost = [[price(one) for one in mine] for mine in passes]
    return [[sum(mine[at : at + count]) for at in range(0, len(mine), count)] for mine in cost]


if __name__ == "__main__":
    main()
