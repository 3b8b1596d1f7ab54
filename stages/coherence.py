"""Coherence: score how far the trajectories of each question agree, and reward each of them (Regime W).

    data/rollouts/<round>.jsonl  ->  data/regime_w_rollouts/<round>.jsonl, metrics/regime_w/<round>.json,
                                     metrics/plots/regime_w/<round>/

Questions are read, scored and written in batches, on all cores, so that memory does not grow with the file. The
batches, and with them every sum, are the same however many cores there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from stages.launch.cores import map_in_order, usable_cores
from stages.regime_w.record import read_questions
from stages.regime_w.scorer import load_scorer, score_batch
from stages.regime_w.tally import Tally, write_plots
from stages.run.errors import UserError
from stages.run.files import atomic_write, write_json
from stages.run.params import load_params
from stages.run.paths import LAST_ROUND, RoundPaths
from stages.run.stage import stage_run

BATCH = 64  # questions
SMALL = 4_000_000  # bytes of rollouts below which starting processes costs more than it saves


def main(
    round_name: str = LAST_ROUND,
    rollouts: Path | None = None,
    out: Path | None = None,
    metrics: Path | None = None,
    plots: Path | None = None,
    cores: int | None = None,
) -> None:
    """Score `rollouts` into `out`, those of the round unless given. `cores` None: all, or one when the file is small.

    Raises UserError when the scorer cannot be used, or a question cannot be read.
    """
    own = RoundPaths(round_name)
    rollouts, out = rollouts or own.rollouts, out or own.scored
    metrics, plots = metrics or own.regime_w, plots or own.plots
    scorer = Path(load_params().regime_w.scorer)
    load_scorer(scorer)  # so that a wrong scorer is reported once, before any work
    with stage_run(
        "coherence",
        variant=round_name,
        sections=("regime_w.scorer", "regime_w.weights", "regime_w.reward", "regime_w.suspect_from"),
        inputs=[rollouts, scorer],
        outputs=[out, metrics, plots],
    ) as run:
        if cores is None:
            cores = 1 if rollouts.stat().st_size < SMALL else usable_cores()

        # Score batch by batch.
        total = Tally()
        score = partial(score_batch, run.params.regime_w)
        with atomic_write(out) as file:
            for text, tally in map_in_order(score, batches(rollouts), cores):
                file.write(text)
                total.merge(tally)
            if not total.counts["questions"]:
                raise UserError(f"{rollouts}: holds no questions; run `dvc repro rollout@{round_name}`")

        # Metrics and plots.
        summary = total.summary()
        write_json(metrics, summary)
        write_plots(plots, total)
        run.finish(
            f"{summary['questions']:,} questions, {summary['trajectories']:,} trajectories, "
            f"{summary['accuracy']:.1%} correct, mean s_wm {summary['signals']['s_wm']:.3f}; "
            f"{summary['equations']['read']:,} equations read, {summary['equations']['skipped']:,} skipped"
        )


def batches(rollouts: Path) -> Iterator[list[dict[str, Any]]]:
    """The questions of the file in lists of BATCH."""
    records = read_questions(rollouts)
    while batch := list(islice(records, BATCH)):
        yield batch
