"""Copy one policy's metrics to `metrics/headline.json`, the fixed path that `dvc metrics diff` compares.

`headline.policy` says whose: two experiments that differ only there give SFT against DPO by DVC's command.
"""

from __future__ import annotations

from pathlib import Path

from stages.core.errors import UserError
from stages.core.params import load_params
from stages.core.records import read_json, write_json
from stages.core.stage import stage_run

METRICS = Path("metrics/platinum")
OUT = Path("metrics/headline.json")


def main(metrics: Path = METRICS, out: Path = OUT) -> None:
    """Copy `<metrics>/<headline.policy>.json` to `out`.

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
    with stage_run("headline", sections=("headline",), inputs=[source], outputs=[out]) as run:
        values = read_json(source)
        if not isinstance(values, dict) or not isinstance(values.get("accuracy"), float):
            raise UserError(f"{source}: holds no 'accuracy'; run `dvc repro evaluate@{policy}`")
        write_json(out, values)
        run.say(f"{policy}: {values['accuracy']:.1%} of the greedy answers are correct")
