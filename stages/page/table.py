"""Prints the result table in the terminal, from `metrics/*.json` alone; it fits 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.page.facts import read_kept
from stages.run.errors import UserError
from stages.run.files import read_json
from stages.run.params import load_params
from stages.run.paths import COMPARISON, LAST_ROUND, PLATINUM_DETAILS, VOTE_DETAILS
from stages.run.rounds import shown
from stages.stats.looks import LUCK, kept_words
from stages.stats.one import health_warnings, samples_in
from stages.stats.p_value import p_words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_results(console: Console | None = None) -> None:
    """Print what each policy scored, what changed from the one before it, and where to look next.

    Raises UserError when nothing was evaluated yet or a metrics file is damaged.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, params = console or Console(), load_params()
    paths = {name: PLATINUM_DETAILS / f"{name}.json" for name in params.policy_names}
    policies = {name: read_json(path) for name, path in paths.items() if path.is_file()}
    if not policies:
        raise UserError("metrics/platinum: there are no results yet; run `dvc repro`")
    comparisons: dict[str, Any] = read_json(COMPARISON) if COMPARISON.is_file() else {}
    k = max(samples_in(metrics) for metrics in policies.values())

    title = f"Platinum test set, {max(metrics['questions'] for metrics in policies.values()):,} questions"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("policy", no_wrap=True)
    table.add_column("greedy (95 %)", justify="right", no_wrap=True)
    table.add_column("change", justify="right", no_wrap=True)
    table.add_column("p", justify="right", no_wrap=True)
    if k:
        table.add_column(f"mean@{k}", justify="right", no_wrap=True)
        table.add_column("change", justify="right", no_wrap=True)
        table.add_column("p", justify="right", no_wrap=True)

    befores = _befores(policies, params.chain)
    kept = read_kept(policies)
    words, warnings = [], []
    for name, metrics in policies.items():
        step = comparisons.get(f"{befores[name]}_to_{name}", {})
        accuracy, low, high = (100 * metrics[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
        unchanged = name in kept and not kept[name]["kept"]
        cells = [
            f"{shown(name)}, step 0" if unchanged else shown(name),
            f"{accuracy:.1f} % ({low:.1f}–{high:.1f})",
            *_change(step, "difference", "p"),
        ]
        if k:
            own = samples_in(metrics)
            cells.append(f"{100 * metrics[f'mean_at_{own}']:.1f} %" if own else "")
            cells += _change(step, "mean_difference", "mean_p")
        table.add_row(*cells)
        words += _step_words(befores[name], name, step)
        warnings += health_warnings(metrics, shown(name))
    if befores.get(LAST_ROUND) != "sft":  # what all rounds brought together
        words += _step_words("sft", LAST_ROUND, comparisons.get(f"sft_to_{LAST_ROUND}", {}))

    console.print(table)
    votes = {name: read_json(path) for name in policies if (path := VOTE_DETAILS / f"{name}.json").is_file()}
    votes = {name: vote for name, vote in votes.items() if vote["questions"]}
    if votes:
        console.print(_vote_table(votes))
    twins = {name: metrics for name, metrics in policies.items() if "changed" in metrics}
    if twins:
        console.print(_changed_table(twins, comparisons, befores))
    tests = list(dict.fromkeys(name for metrics in policies.values() for name in metrics.get("tests", {})))
    if tests:
        console.print(_tests_table(tests, policies, comparisons, befores))
    for line in words:
        console.print(escape(line), highlight=False)
    for name, judged in kept.items():
        line = escape(f"{shown(name)} {kept_words(judged)}.")
        console.print(line if judged["kept"] else f"[bold red]WARNING[/bold red] {line}", highlight=False)
    if kept:
        console.print(LUCK, style="dim", highlight=False)
    for line in warnings:
        console.print(f"[bold red]WARNING[/bold red] {escape(line)}", highlight=False)
    console.print("\nWhere to look next", style="bold")
    for command, what in (
        ("report.html", "open it in a browser: every question, gained and lost"),
        ("dvc metrics show", "all metrics"),
        ("dvc plots show", "curves, arms, coherence"),
    ):
        console.print(f"  {command:<18}{what}", highlight=False)


def _befores(policies: Iterable[str], chain: Mapping[str, str]) -> dict[str, str]:
    """The policy that each evaluated one started from; the one evaluated before it, where that is not there."""
    found: dict[str, str] = {}
    for name in policies:
        start = chain.get(name, "base")
        found[name] = start if start in found else next(reversed(found), "")
    return found


def _step_words(before: str, name: str, step: Mapping[str, Any]) -> list[str]:
    """The verdicts on one step, in lines; none where it was not compared."""
    if not step:
        return []
    words = [f"{shown(before)} → {shown(name)}", f"  greedy {step['verdict']}"]
    if "mean_verdict" in step:
        words.append(f"  mean@{step['samples_b']} {step['mean_verdict']}")
    if "coherent" in step:
        vote = step["coherent"]
        change = f"{100 * vote['difference']:+.1f} points"
        words.append(f"  coherent@{step['samples_b']} {change}: {vote['verdict']}")
    return words


def _vote_table(votes: Mapping[str, Mapping[str, Any]]) -> Table:
    """What the vote by coherence brought each policy, against the majority of the same samples."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    first = next(iter(votes.values()))
    k = first["samples"]
    title = f"The answer that {k} samples elect, weighted by {first['vote']}, in percent"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for number, name in enumerate(
        ("policy", "majority", "coherent (95 %)", "change", "p", "shuffled", f"pass@{k}")
    ):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for name, vote in votes.items():
        k = vote["samples"]
        coherent, low, high = (100 * vote[f"coherent_at_{k}{end}"] for end in ("", "_low", "_high"))
        table.add_row(
            shown(name),
            f"{100 * vote[f'maj_at_{k}']:.1f}",
            f"{coherent:.1f} ({low:.1f}–{high:.1f})",
            *_change(vote, "difference", "p"),
            f"{100 * vote['control_difference']:+.1f}",
            f"{100 * vote[f'pass_at_{k}']:.1f}",
        )
    return table


def _changed_table(
    policies: Mapping[str, Mapping[str, Any]], comparisons: Mapping[str, Any], befores: Mapping[str, str]
) -> Table:
    """What each policy made of the twins, and what changed from the policy before it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    asked = max(metrics["changed_questions"] for metrics in policies.values())
    title = f"Twins of {asked:,} questions, with one number changed, in percent"
    tight = (0, 1, 0, 0)  # eight columns in 80
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=tight)
    for number, name in enumerate(("policy", "twin (95 %)", "change", "p", "both", "change", "p", "kept")):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for name, metrics in policies.items():
        step = comparisons.get(f"{befores[name]}_to_{name}", {})
        changed, low, high = (100 * metrics[f"changed{end}"] for end in ("", "_low", "_high"))
        table.add_row(
            shown(name),
            f"{changed:.1f} ({low:.1f}–{high:.1f})",
            *_change(step.get("changed", {}), "difference", "p"),
            f"{100 * metrics['both']:.1f}",
            *_change(step.get("both", {}), "difference", "p"),
            f"{100 * metrics['kept']:.1f}" if "kept" in metrics else "",
        )
    return table


def _tests_table(
    tests: Sequence[str],
    policies: Mapping[str, Mapping[str, Any]],
    comparisons: Mapping[str, Any],
    befores: Mapping[str, str],
) -> Table:
    """A row for Platinum and one for each other test set: each policy, and what changed from where it started."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    tight = (0, 1, 0, 0)  # nine columns in 80
    title = "Other test sets, greedy, in percent"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=tight)
    table.add_column("test set", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for place, name in enumerate(policies):
        for column in (shown(name), "change", "p") if place else (shown(name),):
            table.add_column(column, justify="right", no_wrap=True)
    for test in ("", *tests):
        cells, asked = [], 0
        for name, metrics in policies.items():
            step = comparisons.get(f"{befores[name]}_to_{name}", {})
            if test:
                metrics, step = metrics.get("tests", {}).get(test, {}), step.get("tests", {}).get(test, {})
            cells.append(f"{100 * metrics['accuracy']:.1f}" if metrics else "")
            cells += _change(step, "difference", "p") if befores[name] else []
            asked = max(asked, metrics.get("questions", 0))
        table.add_row(test or "Platinum", f"{asked:,}", *cells)
    return table


def p_cell(p: float) -> str:
    """A p-value in a column of that name: `0.025` or `<0.0001`."""
    return p_words(p).removeprefix("p ").removeprefix("= ").replace("< ", "<")


def _change(step: Mapping[str, Any], difference: str, p: str) -> list[str]:
    """Two cells: the change in points and its p-value; empty when there is nothing to compare with."""
    if difference not in step:
        return ["", ""]
    return [f"{100 * step[difference]:+.1f}", p_cell(step[p])]
