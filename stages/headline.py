"""Copy one policy's metrics to fixed paths, which `dvc metrics diff` and `dvc plots diff` compare.

`headline.policy` names the policy. Two experiments that differ only in it compare SFT with DPO by DVC's own commands.
metrics/headline.csv has one line for each metric that is a share, so that DVC can draw it as a bar:

    metric,share
    accuracy,0.7402812241521919
    mean_at_8,0.46484698097601324
"""

from __future__ import annotations

import csv
from pathlib import Path

from stages.run.errors import UserError
from stages.run.files import atomic_write, read_json, write_json
from stages.run.params import load_params
from stages.run.paths import HEADLINE, HEADLINE_PLOT, PLATINUM_METRICS
from stages.run.stage import stage_run


def main(metrics: Path = PLATINUM_METRICS, out: Path = HEADLINE, plot: Path = HEADLINE_PLOT) -> None:
    """Copy `<metrics>/<headline.policy>.json` to `out`, and its shares to `plot`.

    Raises UserError when that policy was not evaluated, or its file is damaged or is not a policy's metrics.
    """
    policy = load_params().headline.policy
    source = metrics / f"{policy}.json"
    if not source.is_file():
        there = ", ".join(sorted(path.stem for path in metrics.glob("*.json"))) or "none"
        raise UserError(
            f"{source}: is missing, so headline.policy '{policy}' cannot be shown (evaluated: {there}); "
            f"run `dvc repro evaluate@{policy}`"
        )
    with stage_run("headline", sections=("headline.policy",), inputs=[source], outputs=[out, plot]) as run:
        values = read_json(source)
        if not isinstance(values, dict) or not isinstance(values.get("accuracy"), float):
            raise UserError(f"{source}: holds no 'accuracy'; run `dvc repro evaluate@{policy}`")
        write_json(out, values)
        bounds = ("_low", "_high")
        tests = {f"tests.{name}": share for name, share in values.get("tests", {}).items()}
        plain = {key: value for key, value in values.items() if key != "tests"} | tests
        shares = [(key, value) for key, value in plain.items() if not key.endswith(bounds)]
        with atomic_write(plot) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["metric", "share"])
            writer.writerows(shares)
        run.finish(f"{policy}: {values['accuracy']:.1%} of the greedy answers are correct")
