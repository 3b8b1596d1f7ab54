"""plan: what it says will run is what DVC then runs, and what it says may follow is all that can."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.repo import Repo

from stages.run.errors import UserError
from stages.run.files import write_json
from stages.tools import plan
from stages.tools.plan import ABSENT, Planned, make_plan
from tests.tools.screen import printed, words

# draw → sort → (half, last); half has a code file of its own. The numbers' sum alone decides what `sort` gives.
PIPELINE = """
stages:
  draw:
    cmd: python -c "import json; print(json.load(open('params.json'))['draw']['numbers'])" > numbers.txt
    params: [{params.json: [draw]}]
    outs: [numbers.txt]
  sort:
    cmd: python -c "print(sum(map(int, open('numbers.txt').read().strip('[]\\n').split(','))))" > sum.txt
    deps: [numbers.txt]
    outs: [sum.txt]
  half:
    cmd: python half.py
    deps: [half.py, sum.txt]
    params: [{params.json: [half.by]}]
    outs: [half.txt]
  last:
    cmd: cp sum.txt last.txt
    deps: [sum.txt]
    outs: [last.txt]
"""
HALF = "import json; by = json.load(open('params.json'))['half']['by']\n"
HALF += "open('half.txt', 'w').write(str(int(open('sum.txt').read()) / by))\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small DVC project whose stages have not run yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    Path("dvc.yaml").write_text(PIPELINE)
    Path("half.py").write_text(HALF)
    settings(numbers=[1, 2, 3], by=2)
    Repo.init(no_scm=True)
    yield tmp_path
    os.chdir("/")


@pytest.fixture
def run(project: Path) -> Path:
    """The same after its first run."""
    repro()
    return project


def settings(numbers: list[int], by: int) -> None:
    Path("params.json").write_text(json.dumps({"draw": {"numbers": numbers, "of": "x"}, "half": {"by": by}}))


def repro(*targets: str) -> list[str]:
    """What DVC runs or takes from its cache, in order."""
    with Repo() as repo:
        return [stage.addressing for stage in repo.reproduce(list(targets) or None)]


def names(rows: list[Planned]) -> set[str]:
    return {one.stage for one in rows}


def reasons(rows: list[Planned], stage: str) -> list[str]:
    return next(one.reasons for one in rows if one.stage == stage)


def test_before_the_first_run_everything_and_after_it_nothing(project: Path) -> None:
    made = make_plan()
    assert {one.stage: one.reasons for one in made["will_run"]} == {
        name: ["has not run yet"] for name in ("draw", "sort", "half", "last")
    }
    assert "None of them ran on this machine yet" in printed(plan.main)
    assert set(repro()) == names(made["will_run"])
    made = make_plan()
    assert not made["will_run"] and not made["may_follow"]
    assert set(made["unchanged"]) == {"draw", "sort", "half", "last"} and repro() == []
    assert printed(plan.main) == "Nothing to do: all stages are up to date.\n"


def test_a_parameter_with_its_values_and_what_may_follow(run: Path) -> None:
    """Another order of the same numbers: draw and sort run, and what reads the sum does not."""
    settings(numbers=[3, 2, 1], by=2)
    made = make_plan()
    assert reasons(made["will_run"], "draw") == ["params.json: draw.numbers [1, 2, 3] → [3, 2, 1]"]
    assert names(made["will_run"]) == {"draw"} and names(made["may_follow"]) == {"sort", "half", "last"}
    assert [one.after for one in made["may_follow"] if one.stage == "half"] == [["sort"]]
    done = set(repro())
    assert (
        names(made["will_run"])
        <= done
        == {"draw", "sort"}
        <= names(made["will_run"]) | names(made["may_follow"])
    )


def test_several_reasons_at_once(run: Path) -> None:
    """Code, a parameter, a missing output, an output edited by hand: each named; and what reads them may follow."""
    Path("half.py").write_text(HALF + "# edited\n")
    settings(numbers=[1, 2, 3], by=3)
    Path("numbers.txt").unlink()
    Path("last.txt").unlink()
    Path("last.txt").write_text("7\n")
    made = make_plan()
    assert reasons(made["will_run"], "half") == ["half.py modified", "params.json: half.by 2 → 3"]
    assert reasons(made["will_run"], "draw") == ["numbers.txt deleted"]
    assert reasons(made["will_run"], "last") == ["last.txt modified"]
    assert names(made["may_follow"]) == {"sort"}
    assert {"half", "draw", "last"} <= set(repro())


def test_an_interrupted_run_goes_on(run: Path) -> None:
    """The stages above have run already, so those below will run: what they read has changed."""
    settings(numbers=[9], by=2)
    repro("sort")
    made = make_plan()
    assert reasons(made["will_run"], "half") == reasons(made["will_run"], "last") == ["sum.txt modified"]
    assert not made["may_follow"] and set(repro()) == {"half", "last"}


def test_taken_from_the_cache(run: Path) -> None:
    """Back to values that were run before: DVC takes what it has kept."""
    settings(numbers=[1, 2, 3], by=5)
    repro()
    settings(numbers=[1, 2, 3], by=2)
    (half,) = make_plan()["will_run"]
    assert (half.stage, half.restored) == ("half", True)
    assert "Taken from DVC's cache, not run" in printed(plan.main)
    assert repro() == ["half"] and Path("half.txt").read_text() == "3.0"
    settings(numbers=[1, 2, 3], by=6)
    (half,) = make_plan()["will_run"]
    assert not half.restored


def test_targets_take_what_they_need(run: Path) -> None:
    settings(numbers=[4], by=4)
    made = make_plan(["last"])
    assert names(made["will_run"]) == {"draw"} and names(made["may_follow"]) == {"sort", "last"}
    assert set(repro("last")) == {"draw", "sort", "last"}


def test_a_changed_command_and_a_frozen_stage(run: Path) -> None:
    file = Path("dvc.yaml")
    file.write_text(file.read_text().replace("cp sum.txt last.txt", "cp -f sum.txt last.txt"))
    file.write_text(file.read_text().replace("  sort:\n", "  sort:\n    frozen: true\n"))
    settings(numbers=[5], by=2)
    made = make_plan()
    assert reasons(made["will_run"], "last") == ["its command or its lists in dvc.yaml changed"]
    assert (
        "sort" in made["unchanged"] and names(made["will_run"]) == {"draw", "last"} and not made["may_follow"]
    )
    assert set(repro()) == {"draw", "last"}


def test_what_it_shows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last run's time, the sum, and no line longer than the terminal; the same as JSON."""
    settings(numbers=[2, 1, 3], by=2)
    for stage, seconds in (("draw", 42.4), ("sort", 7300.0)):
        facts = {"stage": stage, "seconds": seconds, "machine": "x86_64, 2 CPUs"}
        write_json(Path(f".work/runs/2026-{stage}.json"), facts)
    text = printed(plan.main, width=90)
    assert re.search(r"draw +params\.json: draw\.numbers \[1, 2, 3\] → \[2, 1, 3\] +42 s", text)
    assert re.search(r"sort +reads draw +2\.0 h", text) and re.search(r"half +reads sort +–", text)
    total = "At most 2.0 h, by their last runs here (x86_64, 2 CPUs); 2 of them did not run here yet."
    assert total in words(text)
    plan.main(as_json=True)
    made = json.loads(capsys.readouterr().out)
    (draw,) = made["will_run"]
    assert draw["reasons"] == ["params.json: draw.numbers [1, 2, 3] → [2, 1, 3]"]
    assert draw["last"]["seconds"] == 42.4
    assert [one["stage"] for one in made["may_follow"]] == ["sort", "half", "last"]


def test_values_that_were_not_there() -> None:
    """A section whose key is new or gone, null or not, and a long value."""
    found = list(plan._differences("p", "a", {"x": None, "same": [2]}, {"y": "z" * 99, "same": [2]}))
    assert found == [f"p: a.y {ABSENT} → {'z' * 39}…", f"p: a.x null → {ABSENT}"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [("dvc.lock", "}{", "dvc.lock"), ("dvc.yaml", "stages: 7", "dvc.yaml"), ("dvc.yaml", None, "no-such")],
)
def test_what_dvc_cannot_read_is_one_line(run: Path, file: str, text: str | None, message: str) -> None:
    if text:
        Path(file).write_text(text)
    with pytest.raises(UserError, match=rf"^plan: .*{message}") as error:
        make_plan([] if text else ["no-such"])
    assert "\n" not in str(error.value)


def test_outside_of_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^plan: .*not.* a DVC repo"):
        make_plan()
