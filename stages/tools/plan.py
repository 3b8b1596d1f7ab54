"""`python -m stages plan`: what `dvc repro` would run, why, what may follow, and how long it took last time.

    Will run
      stage        because                                            last time
      coherence    params.yaml: regime_w.weights.s_cf 0.2 → 0.3       9 s

    May follow: only what reads something that comes out changed
      preference   reads coherence                                    2 s
      ...

The answer is DVC's own (`Repo.index`, `Stage.status`), so that it cannot differ from what `dvc repro` does;
`dvc repro --dry` stops at the first stage that would run, since it cannot know what that one gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from stages.core.errors import UserError
from stages.core.stage import last_runs

if TYPE_CHECKING:
    from rich.console import Console

MISSING = object()
LONGEST = 40  # characters of a value in the table
WORDS = {
    "modified": "changed",
    "deleted": "is missing",
    "new": "is new",
    "not in cache": "is not in the cache",
}


@dataclass(frozen=True)
class Reason:
    """Why a stage runs: a file or a parameter (with its old and new value), or a sentence in `path` alone."""

    path: str
    what: str = ""
    key: str | None = None
    old: Any = None
    new: Any = None

    def __str__(self) -> str:
        if self.key is None:
            return f"{self.path} {self.what}".strip()
        return f"{self.path}: {self.key} {_short(self.old)} → {_short(self.new)}"


@dataclass
class Planned:
    """One stage: why it runs, after which stages it may have to, and the facts of its last run on this machine."""

    stage: str
    reasons: list[Reason] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    restored: bool = False  # DVC has the outputs of just this in its cache, and takes them without running
    last: dict[str, Any] | None = None


@dataclass
class Plan:
    """All stages that were asked for, each in one of the lists, in the order `dvc repro` takes them."""

    will_run: list[Planned]
    may_follow: list[Planned]
    unchanged: list[str]
    frozen: list[str]


def main(targets: Sequence[str] = (), as_json: bool = False, console: Console | None = None) -> None:
    """Print the plan for the given stages and what they need; for all stages without any.

    Raises UserError when this is no DVC project, or one that DVC cannot read, or a target that it does not know.
    """
    from rich.console import Console

    console = console or Console()
    plan = make_plan(targets)
    if as_json:
        console.print(json.dumps(_plain(plan), ensure_ascii=False, indent=2), markup=False, soft_wrap=True)
        return
    _show(plan, console)


def make_plan(targets: Sequence[str] = ()) -> Plan:
    """What `dvc repro` with these targets would do now. Nothing is written; see `main` for errors."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo, repo.lock:
            return _ask_dvc(repo, targets)
    except DvcException as error:
        words = " ".join(str(error).split())
        raise UserError(f"plan: {words}") from None


def _ask_dvc(repo: Any, targets: Sequence[str]) -> Plan:
    import networkx

    graph = repo.index.graph  # from a stage to those it reads from
    wanted = {stage for target in targets for stage in repo.stage.collect(target)} if targets else set(graph)
    needed = wanted.union(*(networkx.descendants(graph, stage) for stage in wanted))
    order = [stage for stage in networkx.dfs_postorder_nodes(graph) if stage in needed]
    makers = [(out, stage) for stage in graph for out in stage.outs]
    last = {run["stage"]: run for run in last_runs()}
    plan = Plan([], [], [], [])
    moving: set[Any] = set()  # stages whose outputs may come out changed
    for stage in order:
        name = stage.addressing
        if stage.frozen:
            plan.frozen.append(name)
            continue
        above = [one for one in graph.successors(stage) if one in moving]
        theirs = [out for out, maker in makers if maker in above]
        reasons = list(_reasons(stage, [out.fs_path for out in theirs]))
        planned = Planned(name, reasons, sorted(one.addressing for one in above), last=last.get(name))
        if reasons:
            planned.restored = not above and _is_cached(repo, stage)
            plan.will_run.append(planned)
        elif above:
            plan.may_follow.append(planned)
        else:
            plan.unchanged.append(name)
            continue
        moving.add(stage)
    return plan


def _reasons(stage: Any, made_above: Sequence[str]) -> Iterator[Reason]:
    """Why a stage runs whatever the stages above give; `made_above` are paths that may change before it."""
    from dvc.dependency import ParamsDependency

    if not any(one.hash_info for one in (*stage.deps, *stage.outs)):
        yield Reason("has not run yet")
        return
    if stage.changed_stage():
        yield Reason(f"its command or its lists in {stage.relpath} changed")
    if stage.is_callback or stage.always_changed:
        yield Reason("runs every time")
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            yield from _changed_params(dep)
        elif not any(dep.fs_path == path or dep.fs_path.startswith(f"{path}/") for path in made_above):
            yield from (Reason(path, WORDS.get(what, what)) for path, what in dep.status().items())
    for out in stage.outs:
        yield from (Reason(path, WORDS.get(what, what)) for path, what in out.status().items())


def _changed_params(dep: Any) -> Iterator[Reason]:
    if not dep.workspace_status():
        return
    then, now = dict(dep.hash_info.value or {}), dep.read_params()
    for key in dep.params:
        yield from _differences(str(dep), key, then.get(key, MISSING), now.get(key, MISSING))


def _differences(path: str, key: str, old: Any, new: Any) -> Iterator[Reason]:
    """The single values that differ, by their dotted keys."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*new, *old]):
            yield from _differences(path, f"{key}.{name}", old.get(name, MISSING), new.get(name, MISSING))
    elif old != new:
        yield Reason(path, "changed", key, old, new)


def _is_cached(repo: Any, stage: Any) -> bool:
    """Whether DVC would take the stage's outputs from its cache: it ran before with just these inputs."""
    from dvc.exceptions import DvcException
    from dvc.stage.cache import RunCacheNotFoundError
    from dvc_data.hashfile.hash_info import HashInfo

    try:
        if stage.changed_stage() or not stage.deps_cached():
            # As before a run, of this object in memory: today's inputs, and outputs that are not known yet.
            stage.save_deps()
            for out in stage.outs:
                out.hash_info = HashInfo()
        repo.stage_cache.restore(stage, dry=True)
    except (RunCacheNotFoundError, DvcException, OSError):
        return False
    return True


# ---- showing it --------------------------------------------------------------------------------------


def _show(plan: Plan, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    if plan.frozen:
        console.print(f"Frozen, so never run: {', '.join(plan.frozen)}.", markup=False, highlight=False)
    if not plan.will_run:
        console.print("Nothing to do: all stages are up to date.", highlight=False)
        return

    def table(title: str, rows: list[Planned], column: str) -> None:
        console.print(f"[bold]{title}[/bold]", highlight=False)
        shown = Table(box=SIMPLE_HEAD, pad_edge=False)
        shown.add_column("stage", no_wrap=True)
        shown.add_column(column, overflow="fold", ratio=1)
        shown.add_column("last time", no_wrap=True)
        for one in rows:
            why = [str(reason) for reason in one.reasons] or [f"reads {', '.join(one.after)}"]
            if len(why) > 6:
                why = [*why[:5], f"and {len(why) - 5} more"]
            shown.add_row(escape(one.stage), escape("\n".join(why)), _last(one))
        console.print(shown)

    run = [one for one in plan.will_run if not one.restored]
    restored = [one for one in plan.will_run if one.restored]
    if restored:
        table("Taken from DVC's cache, not run: the same was run before", restored, "because")
    if run:
        table("Will run", run, "because")
    if plan.may_follow:
        table("May follow: only what reads something that comes out changed", plan.may_follow, "because")
    if plan.unchanged:
        console.print(f"Up to date: {', '.join(plan.unchanged)}.", markup=False, highlight=False)
    noted = [one.last for one in (*run, *plan.may_follow) if one.last]
    unknown = len(run) + len(plan.may_follow) - len(noted)
    if noted:
        seconds = sum(float(one["seconds"]) for one in noted)
        machines = sorted({str(one["machine"]) for one in noted})
        text = f"At most {_duration(seconds)}, by their last runs here ({'; '.join(machines)})"
        text += f"; {unknown} of them did not run here yet." if unknown else "."
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    elif unknown:
        console.print("None of them ran on this machine yet, so how long it takes is not known.")


def _last(planned: Planned) -> str:
    if planned.last is None:
        return "–"
    return _duration(float(planned.last["seconds"]))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _short(value: Any) -> str:
    if value is MISSING:
        return "(not there)"
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _plain(plan: Plan) -> dict[str, Any]:
    """The plan as JSON; a value that was or is not there is left out."""

    def stage(one: Planned) -> dict[str, Any]:
        reasons = [
            {key: value for key, value in vars(reason).items() if value is not MISSING and value != ""}
            for reason in one.reasons
        ]
        return {**asdict(one), "reasons": reasons}

    return {
        "will_run": [stage(one) for one in plan.will_run],
        "may_follow": [stage(one) for one in plan.may_follow],
        "unchanged": plan.unchanged,
        "frozen": plan.frozen,
    }
