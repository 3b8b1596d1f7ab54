"""`python -m stages plan`: what `dvc repro` would run, why, what may follow, and how long it took last time.

DVC itself is asked (`Repo.index`, `Stage.status`), so the answer cannot differ from what `dvc repro` does.
`dvc repro --dry` is no substitute: it stops at the first stage that would run, whose results it cannot know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from stages.run.errors import UserError
from stages.run.pace import words
from stages.run.stage import last_runs
from stages.tools.show import at_most, new_console, new_table, print_json

ABSENT = "(not there)"  # the value of a parameter that is new or gone
LONGEST = 40  # characters of a value in the table


@dataclass
class Planned:
    """One stage: why it runs, which stages above it may change what it reads, and its last run on this machine.

    `place` is its place in the order of `dvc repro`.
    """

    stage: str
    place: int
    reasons: list[str]
    after: list[str]
    restored: bool  # DVC takes the outputs from its cache instead of running the stage
    last: dict[str, Any] | None


# All stages that were asked for, in the order `dvc repro` takes them: the Planned ones under `will_run` and
# `may_follow`, and the names of the others, which stay as they are or are frozen, under `unchanged`.
Plan = dict[str, list[Any]]


def main(targets: Sequence[str] = (), as_json: bool = False) -> None:
    """Print the plan for the given stages and what they need; for all stages without any.

    Raises UserError when this is no DVC project, or one that DVC cannot read, or a target that it does not know.
    """
    plan = make_plan(targets)
    if as_json:
        print_json(plan)
    else:
        show(plan, new_console())


def make_plan(targets: Sequence[str] = ()) -> Plan:
    """What `dvc repro` with these targets would do now. Nothing is written; see `main` for errors."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo, repo.lock:
            return _ask_dvc(repo, targets)
    except DvcException as error:
        raise UserError(f"plan: {' '.join(str(error).split())}") from None


def _ask_dvc(repo: Any, targets: Sequence[str]) -> Plan:
    import networkx

    graph = repo.index.graph  # its edges lead from a stage to those it reads from
    wanted = {stage for target in targets for stage in repo.stage.collect(target)} if targets else set(graph)
    needed = wanted.union(*(networkx.descendants(graph, stage) for stage in wanted))
    last = {run["stage"]: run for run in last_runs()}
    plan: Plan = {"will_run": [], "may_follow": [], "unchanged": []}
    moving: set[Any] = set()  # stages whose outputs may change
    for place, stage in enumerate(networkx.dfs_postorder_nodes(graph)):
        if stage not in needed:
            continue
        name = stage.addressing
        above = [one for one in graph.successors(stage) if one in moving]
        reasons = list(_reasons(stage, [out.fs_path for one in above for out in one.outs]))
        if stage.frozen or not (reasons or above):
            plan["unchanged"].append(name)
            continue
        moving.add(stage)
        restored = bool(reasons) and not above and _is_cached(repo, stage)
        planned = Planned(
            name, place, reasons, sorted(one.addressing for one in above), restored, last.get(name)
        )
        plan["will_run" if reasons else "may_follow"].append(planned)
    return plan


def _reasons(stage: Any, made_above: Sequence[str]) -> Iterator[str]:
    """Why a stage runs in any case. `made_above`: paths that stages above may still change; they are no reason yet."""
    from dvc.dependency import ParamsDependency

    if not any(one.hash_info for one in (*stage.deps, *stage.outs)):
        yield "has not run yet"
        return
    if stage.changed_stage():
        yield f"its command or its lists in {stage.relpath} changed"
    if stage.is_callback or stage.always_changed:
        yield "runs every time"
    for one in (*stage.deps, *stage.outs):
        if isinstance(one, ParamsDependency):
            then, now = dict(one.hash_info.value or {}), one.read_params()
            for key in one.params if one.workspace_status() else ():
                yield from _differences(str(one), key, then.get(key, ABSENT), now.get(key, ABSENT))
        elif not any(one.fs_path == path or one.fs_path.startswith(f"{path}/") for path in made_above):
            yield from (f"{path} {what}" for path, what in one.status().items())


def _differences(path: str, key: str, old: Any, new: Any) -> Iterator[str]:
    """The single values that differ, by their dotted keys."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*new, *old]):
            yield from _differences(path, f"{key}.{name}", old.get(name, ABSENT), new.get(name, ABSENT))
    elif old != new:
        yield f"{path}: {key} {_short(old)} → {_short(new)}"


def _is_cached(repo: Any, stage: Any) -> bool:
    """Whether DVC would take the stage's outputs from its cache: it ran before with just these inputs."""
    from dvc.exceptions import DvcException
    from dvc.stage.cache import RunCacheNotFoundError
    from dvc_data.hashfile.hash_info import HashInfo

    try:
        if stage.changed_stage() or not stage.deps_cached():
            # What DVC does before a run, on this object in memory: take today's inputs, forget the outputs.
            stage.save_deps()
            for out in stage.outs:
                out.hash_info = HashInfo()
        repo.stage_cache.restore(stage, dry=True)
    except (RunCacheNotFoundError, DvcException, OSError):
        return False
    return True


# ---- showing it --------------------------------------------------------------------------------------


def show(plan: Plan, console: Console) -> None:
    """Print the plan as tables, with the time it takes at most."""
    if not plan["will_run"]:
        console.print("Nothing to do: all stages are up to date.")
        return
    run = [one for one in plan["will_run"] if not one.restored]
    restored = [one for one in plan["will_run"] if one.restored]
    for title, stages in (
        ("Taken from DVC's cache, not run: the same was run before", restored),
        ("Will run", run),
        ("May follow: only what reads something that comes out changed", plan["may_follow"]),
    ):
        if stages:
            console.print(title, style="bold")
            console.print(_table(stages))
    if plan["unchanged"]:
        console.print(f"Up to date: {', '.join(plan['unchanged'])}.")
    noted = [one.last for one in (*run, *plan["may_follow"]) if one.last]
    unknown = len(run) + len(plan["may_follow"]) - len(noted)
    if noted:
        time = words(sum(one["seconds"] for one in noted))
        machines = "; ".join(sorted({one["machine"] for one in noted}))
        rest = f"; {unknown} of them did not run here yet." if unknown else "."
        console.print(f"At most {time}, by their last runs here ({machines}){rest}", soft_wrap=True)
    elif unknown:
        console.print("None of them ran on this machine yet, so how long it takes is not known.")


def _table(stages: Sequence[Planned]) -> Any:
    table = new_table("stage", "because", "last time")
    for one in stages:
        why = at_most(6, one.reasons or [f"reads {', '.join(one.after)}"])
        last = "–" if one.last is None else words(one.last["seconds"])
        table.add_row(one.stage, "\n".join(why), last)
    return table


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
