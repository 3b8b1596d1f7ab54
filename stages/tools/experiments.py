"""`python -m stages results --experiments`: the experiments of this commit, by what they answered on validation.

DVC is asked which there are (`dvc exp show`). Their figures lie in the commits that DVC makes of them. The test set is
for one policy, chosen before: with its name it is shown, for no other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

from stages.page.table import p_cell
from stages.run.errors import UserError
from stages.run.history import parse_lock
from stages.run.paths import LAST, LAST_ROUND, LOCK, PLATINUM_DETAILS
from stages.stats.one import samples_in
from stages.tools.show import cell, nearest, new_console, new_table

Values = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """One experiment: what DVC says of it, and what its last round kept, once that is trained."""

    name: str
    state: str  # success, failed, queued or running
    rev: str
    params: Values  # as dvc.yaml names them: file -> nested values
    lock: Values  # its dvc.lock; empty unless it ended well
    kept: Values | None  # metrics/kept/dpo.json (stages/stats/looks.py)

    @property
    def score(self) -> float:
        """The validation score of the step that is kept; -1 when nothing was trained."""
        return self.kept["score_best" if self.kept["kept"] else "score_start"] if self.kept else -1.0


def main(chosen: str | None) -> None:
    """Print the experiments, the best on validation first; of the `chosen` one also the test set.

    Raises UserError when DVC cannot list them, or knows none, or none called `chosen`.
    """
    committed, found = read_experiments()
    if not found:
        raise UserError("no experiment of this commit; docs/pipeline.md shows how to queue some")
    found.sort(key=lambda one: one.score, reverse=True)
    console = new_console()
    right = ("step", "score", "gain", "p")
    table = new_table("experiment", "changed", "step", "score", "gain", "p", right=right)
    for one in found:
        changed = "\n".join(f"{key}: {cell(value)}" for key, value in changes(committed, one.params).items())
        figures = [one.state if one.state != "success" else "not trained", "", "", ""]
        if one.kept:
            gain = 100 * one.kept["difference"] if one.kept["kept"] else 0.0
            score = f"{100 * one.score:.1f} %"
            figures = [str(one.kept["kept"]), score, f"{gain:+.1f}", p_cell(one.kept["p"])]
        table.add_row(one.name, changed or "nothing", *figures)
    console.print(table)
    for line in [tried(found), *luck(found)]:
        console.print(line, soft_wrap=True)
    if chosen:
        console.print(f"\n{on_platinum(found, chosen)}", soft_wrap=True)


def read_experiments() -> tuple[Values, list[Experiment]]:
    """The parameters of the commit, and its experiments. Raises UserError when DVC cannot list them."""
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`dvc exp show` failed: {' '.join(done.stderr.split()) or done.returncode}")
    _, commit, *_ = json.loads(done.stdout)
    if not commit["data"]:
        raise UserError(f"the commit's dvc.yaml cannot be read by DVC: {(commit['error'] or {}).get('msg')}")
    found = []
    for one in commit["experiments"] or []:
        last = one["revs"][0]
        params = {file: values["data"] for file, values in (last["data"] or {}).get("params", {}).items()}
        # One that DVC did not run from a queue has no executor, and is there because it ended well.
        state = (one["executor"] or {}).get("state") or "success"
        lock = _lock_of(last["rev"]) if state == "success" else {}
        kept = _read(last["rev"], LAST.kept) if is_current(lock, params, f"dpo@{LAST_ROUND}") else None
        found.append(Experiment(one["name"] or last["rev"][:7], state, last["rev"], params, lock, kept))
    return {file: values["data"] for file, values in commit["data"]["params"].items()}, found


def is_current(lock: Values, params: Values, stage: str) -> bool:
    """Whether a stage's outputs are those of these parameters, by dvc.lock, and so for every stage before it.

    An experiment may have run some stages only; the outputs of the others are still those of the commit.
    """
    if stage not in lock:
        return False
    made = {out["path"]: (name, out["md5"]) for name, entry in lock.items() for out in entry.get("outs", [])}
    for file, values in lock[stage].get("params", {}).items():
        if any(_dig(params.get(file, {}), key) != value for key, value in values.items()):
            return False
    for dep in lock[stage].get("deps", []):
        for path, (name, md5) in made.items():
            if dep["path"] == path and dep["md5"] != md5:
                return False
            if f"{dep['path']}/".startswith(f"{path}/") and not is_current(lock, params, name):
                return False
    return True


def changes(before: Values, after: Values, above: str = "") -> Values:
    """The parameters that differ, by their dotted names; a name that was taken out has the value None."""
    found: Values = {}
    for key in {**before, **after}:
        name = f"{above}{key}" if above or not key.endswith(".yaml") else ""
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= changes(old, new, f"{name}." if name else "")
        elif old != new:
            found[name] = new
    return found


def tried(found: list[Experiment]) -> str:
    """How many there are, and how they ended."""
    states = [one.state for one in found]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return (
        f"{len(found)} tried ({counts}). score: validation questions answered right by the step that is kept."
    )


def luck(found: list[Experiment]) -> list[str]:
    """How much of the best score may be luck.

    The mean of the largest of n equal ones is about z((n - 0.375) / (n + 0.25)) standard errors (Blom 1958).
    """
    scores = [one for one in found if one.kept]
    if len(scores) < 2:
        return []
    best, n = scores[0], len(scores)
    assert best.kept
    questions = best.kept["questions"]
    error = sqrt(best.score * (1 - best.score) / questions)
    points = 100 * error * NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
    lines = [
        f"The best of {n} is partly the luckiest: were all of them equally good, it would seem better by up to "
        f"{points:.1f} points on {questions} questions."
    ]
    if len({one.kept["questions"] for one in scores if one.kept}) > 1:
        lines.append(
            "They were asked different numbers of validation questions, so their scores do not compare."
        )
    return lines


def on_platinum(found: list[Experiment], chosen: str) -> str:
    """What the chosen experiment answered on the test set. Raises UserError when there is none of that name."""
    named = {one.name: one for one in found}
    if chosen not in named:
        raise UserError(f"no experiment '{chosen}'{nearest(chosen, named)}")
    one = named[chosen]
    if not is_current(one.lock, one.params, f"evaluate@{LAST_ROUND}"):
        return (
            f"{chosen} was not evaluated on Platinum. `dvc exp apply {chosen}` and `dvc repro` do that, "
            "and `python -m stages results` shows it."
        )
    details = _read(one.rev, PLATINUM_DETAILS / f"{LAST_ROUND}.json")
    accuracy, low, high = (100 * details[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
    words = f"{chosen}, chosen of {len(found)}, on Platinum: greedy {accuracy:.1f} % ({low:.1f}–{high:.1f})"
    if k := samples_in(details):
        words += f", mean@{k} {100 * details[f'mean_at_{k}']:.1f} %"
    return words


def _dig(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _show(rev: str, path: Path) -> str:
    """A file of a commit. Raises UserError when git does not have it."""
    done = subprocess.run(["git", "show", f"{rev}:./{path}"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{path} of {rev[:7]}: {done.stderr.strip()}")
    return done.stdout


def _read(rev: str, path: Path) -> Any:
    return json.loads(_show(rev, path))


def _lock_of(rev: str) -> Values:
    return parse_lock(_show(rev, LOCK))
