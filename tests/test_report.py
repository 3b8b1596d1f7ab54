"""The report: the comparison is right; the page stands alone, never varies, and works in a browser."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from collections.abc import Iterator
from html import unescape
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stages import report
from stages.page import facts
from stages.page.table import print_results
from stages.run.errors import UserError
from stages.run.files import write_json, write_jsonl
from stages.run.paths import KEPT
from stages.stats.changed import changed_metrics
from stages.stats.looks import LUCK, judge, kept_words
from stages.stats.one import BOOTSTRAP_SEED, summarise
from stages.stats.paired import compare, compare_changed, compare_tests, compare_votes
from stages.stats.testsets import metrics_of_tests
from stages.stats.vote import VoteSummary
from tests.browser import CHROMIUM, Browser

REPO = Path(__file__).resolve().parents[1]
RATES = {"base": 0.4, "sft": 0.7, "dpo": 0.9}


def rows_of(policy: str, n: int = 60, **over: Any) -> list[dict[str, Any]]:
    rng = random.Random(policy)
    made = []
    for i in range(n):
        right = random.Random(i).random() < RATES[policy]
        answer = str(i if right else i + 1)
        row = {
            "id": f"platinum-{i:05d}", "gold": str(i),
            "question": f"Zoë has {i} <b>apples</b> & counts them. How many?",
            "completion": f"</script><img src='https://x.org/{policy}'> <<{i}+0={answer}>> #### {answer}",
            "answer": answer, "correct": right, "flexible_answer": answer, "flexible_correct": right,
            "tokens": 20 + i % 5, "finish": "stop", "leak": False, "answers_found": 1,
        }  # fmt: skip
        drawn = [rng.random() < RATES[policy] for _ in range(4)]
        row["samples"] = [
            {"completion": "x", "answer": str(i + (not good)), "correct": good} for good in drawn
        ]
        made.append(row | over)
    return made


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with this project's parameters and three evaluated policies, as working directory."""
    for name in ("params.yaml", "requirements.txt"):
        shutil.copy(REPO / name, tmp_path)
    shutil.copytree(REPO / "profiles", tmp_path / "profiles")
    for name in RATES:
        put(tmp_path, name, rows_of(name))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(root: Path, name: str, rows: list[dict[str, Any]]) -> None:
    write_jsonl(root / f"data/platinum_eval/{name}.jsonl", rows)
    write_json(root / f"metrics/platinum_details/{name}.json", summarise(rows, 1) | changed_metrics(rows, 1))


def with_twins(policy: str) -> list[dict[str, Any]]:
    """Every third question has no twin; the twin is right where the next question is."""
    rows = rows_of(policy)
    return [
        row | {"twins": [{"id": f"{row['id']}~1", "correct": after["correct"]}] if i % 3 else []}
        for i, (row, after) in enumerate(zip(rows, [*rows[1:], rows[0]], strict=True))
    ]


def put_votes(root: Path, name: str, **without: bool) -> dict[str, Any]:
    """The vote of a policy as its stage writes it, with weights made up here."""
    summary, rng = VoteSummary("s_cf"), random.Random(name)
    for row in rows_of(name):
        weights = {rule: [rng.random() for _ in row["samples"]] for rule in ("s_end", "s_cf", "both")}
        summary.add(row, {rule: values for rule, values in weights.items() if rule not in without})
    write_json(root / f"metrics/vote_details/{name}.json", summary.metrics())
    return summary.metrics()


def add_everything(root: Path) -> None:
    """Curves, plots, metrics of earlier stages, manifests and a lock that agrees with them."""
    kind = {
        "pairs": 12, "questions": 9, "mean_margin": 0.5, "length_difference": 1.5, "chosen_not_shorter": 0.75,
    }  # fmt: skip
    none = {"pairs": 0, "mean_margin": None, "refused": {"same": 2}}
    manifest = {
        "stage": "evaluate@sft",
        "params": {"evaluate": {"samples": 4, "system": None}},
        "inputs": {"not/pulled": "1e" * 32},
        "outputs": {"a": "0f" * 32},
    }
    files = {
        "metrics/curves/sft.csv": "step,loss,grad_norm\n1,2.5,1\n2,1.5,\n3,1.25,0.5\n",
        "metrics/curves/dpo.csv": "step,loss,reward_margin,logp_chosen,logp_rejected,grad_norm\n"
        "1,0.69,0,-20,-21,1\n2,0.6,0.4,-20,-25,1\n",
        "metrics/curves/sft_selection.csv": "step,valid_accuracy,valid_mean\n0,0.7,0.6\n3,0.6,0.5\n",
        "metrics/curves/dpo_selection.csv": "step,valid_accuracy,valid_mean\n0,0.7,0.6\n10,0.8,0.7\n",
        "metrics/plots/regime_w/dpo/arms.csv": "arm,mean_reward,low,high,pulls,best_share,regret\n"
        "plain,1,0.9,1.1,10,0.4,0.2\ntutor,1.2,1,1.3,9,0.6,0\nnew,,,,1,,\n",
        "metrics/plots/regime_w/dpo/coherence.csv": "s_wm,trajectories,accuracy\n0.05,3,0.2\n0.15,0,\n0.95,4,0.75\n",
        "metrics/preference/dpo.json": json.dumps({"pairs": 12, "correctness": kind, "coherence": none}),
        "data/platinum_eval/sft.manifest.json": json.dumps(manifest),
        "dvc.lock": "stages:\n  evaluate@sft:\n    params:\n      profiles/tiny.yaml:\n"
        "        evaluate:\n          samples: 4\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def put_kept(root: Path, name: str, start: str, before: list[int], after: list[int]) -> str:
    """Which step of a training was kept, as its stage writes it; returns the words."""
    judged = judge({0: before, 20: after, 38: before}, 1, 0.05) | {"start": start}
    write_json(root / f"metrics/kept/{name}.json", judged)
    return kept_words(judged)


# --- what it writes


def test_evaluations_alone_are_enough(workplace: Path) -> None:
    """The comparison and the plot's data are there, and the page has no sections of what did not run."""
    report.main()
    page = (workplace / "report.html").read_text()
    assert "There is no dvc.lock yet" in page and "No manifests were found" in page
    assert 'id="training"' not in page and 'id="coherence"' not in page
    made = json.loads((workplace / "metrics/comparison.json").read_text())
    assert list(made) == ["base_to_sft", "sft_to_dpo", "base_to_dpo"]
    assert made["sft_to_dpo"] == compare(rows_of("sft"), rows_of("dpo"), "SFT", "DPO", BOOTSTRAP_SEED)
    assert made["sft_to_dpo"]["gained"] > 0
    rows = list(csv.DictReader((workplace / "metrics/plots/policies.csv").read_text().splitlines()))
    assert [row["policy"] for row in rows] == ["base", "SFT", "DPO"]
    metrics = json.loads((workplace / "metrics/platinum_details/dpo.json").read_text())
    assert float(rows[2]["accuracy"]) == metrics["accuracy"]
    assert float(rows[2]["mean_high"]) == metrics["mean_at_4_high"]


def test_same_bytes_twice(workplace: Path) -> None:
    """A second run, with the first one's outputs and manifest lying there, writes the same bytes."""
    add_everything(workplace)
    outputs = ("report.html", "metrics/comparison.json", "metrics/plots/policies.csv")
    report.main()
    first = [(workplace / name).read_bytes() for name in outputs]
    report.main()
    assert [(workplace / name).read_bytes() for name in outputs] == first


# --- the page


def test_page_loads_nothing_and_names_no_place(workplace: Path) -> None:
    """No address, no loading attribute, nothing of this machine; completions cannot break out of the data."""
    add_everything(workplace)
    report.main()
    page = (workplace / "report.html").read_text()
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert "http://" not in page and "https://" not in page
    assert not re.search(r"\b(src|srcset|action)\s*=|@import|url\(", page.replace(data[1], ""))
    assert page.count("</script>") == 2
    assert str(workplace) not in page
    questions = json.loads(data[1])
    assert questions["rows"][7]["text"][1] == rows_of("sft")[7]["completion"]
    assert len(questions["rows"]) == 60


def test_page_shows_everything_that_is_there(workplace: Path) -> None:
    add_everything(workplace)
    report.main()
    page = (workplace / "report.html").read_text()
    for words in (
        "DPO: log-probabilities", "DPO: accuracy on the validation split",
        "SFT: accuracy on the validation split", "Mean reward of each arm",
        "Accuracy against s_wm", "coherence › refused › same", "0f" * 32,
        "The 1 manifests, the files they name and dvc.lock agree",
        "Pairs by kind", ">+1.50<", "<th scope=\"col\">pulls</th>",
    ):  # fmt: skip
        assert words in page
    verdict = json.loads((workplace / "metrics/comparison.json").read_text())["sft_to_dpo"]["verdict"]
    assert f"SFT → DPO, greedy: {verdict}." in page.replace("\u00a0", " ")
    assert 'class="warn"' not in page


def test_page_shows_the_votes(workplace: Path) -> None:
    """A row a policy, and a row a signal; what one policy's samples could not be weighed by is a dash."""
    votes = {name: put_votes(workplace, name) for name in ("base", "sft")}
    put_votes(workplace, "dpo", both=True)
    report.main()
    page = (workplace / "report.html").read_text()
    section = page.split('<section id="votes">')[1].split("</section>")[0]
    assert "<h2>Votes of 4 samples</h2>" in section and '<a href="#votes">' in page
    for vote in votes.values():
        for key in ("maj_at_4", "coherent_at_4", "pass_at_4"):
            assert f"<td>{100 * vote[key]:.1f} %" in section
        for key in ("difference", "control_difference"):
            low, high = 100 * vote[f"{key}_low"], 100 * vote[f"{key}_high"]
            words = f'<td>{100 * vote[key]:+.1f} points<span class="soft">{low:+.1f} to {high:+.1f}</span>'
            assert words in section
    assert section.split('<th scope="row">both</th>')[1].count("<td>–</td>") == 3
    assert section.split('<th scope="row">s_<wbr>cf</th>')[1].split("</tr>")[0].count("<td>") == 9


def test_twins_are_compared_and_shown(workplace: Path) -> None:
    """In the comparison, on the page and in the table; without twins nothing of it is there."""
    report.main()
    assert 'id="twins"' not in (workplace / "report.html").read_text()
    rows = {name: with_twins(name) for name in RATES}
    for name in RATES:
        put(workplace, name, rows[name])
    report.main()
    made = json.loads((workplace / "metrics/comparison.json").read_text())["sft_to_dpo"]
    paired = compare_changed(rows["sft"], rows["dpo"], ("SFT", "DPO"), BOOTSTRAP_SEED)
    assert {name: made[name] for name in paired} == paired and paired["both"]["questions"] == 40
    page = (workplace / "report.html").read_text()
    section = page.split('<section id="twins">')[1].split("</section>")[0]
    shown = table_text()
    for name in RATES:
        metrics = changed_metrics(rows[name], 1)
        for key in ("changed", "both", "kept"):
            assert f"<td>{100 * metrics[key]:.1f} %<" in section
            assert f" {100 * metrics[key]:.1f} " in shown
        assert f"<td>{100 * metrics['changed_drop']:+.1f} points<" in section
    for one in paired.values():
        assert f"<td>{100 * one['difference']:+.1f} points<" in section
        assert f" {100 * one['difference']:+.1f} " in shown
    assert "Twins of 40 questions, with one number changed, in percent" in shown


def put_tests(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Two other test sets, on one of which the later policy is worse."""
    made = {}
    for name, other in zip(RATES, reversed(RATES), strict=True):
        sets = {"svamp": rows_of(name, n=30), "mine": rows_of(other, n=40)}
        made[name] = [{"test": test, **row} for test, rows in sets.items() for row in rows]
        write_jsonl(root / f"data/tests_eval/{name}.jsonl", made[name])
        path = root / f"metrics/platinum_details/{name}.json"
        write_json(path, json.loads(path.read_text()) | metrics_of_tests(made[name], 1))
    return made


def test_other_test_sets_are_compared_and_shown(workplace: Path) -> None:
    """A row each below Platinum's, on the page and in the table; a loss elsewhere stands in the page's head."""
    rows = put_tests(workplace)
    report.main()
    made = json.loads((workplace / "metrics/comparison.json").read_text())
    paired = compare_tests(rows["sft"], rows["dpo"], ("SFT", "DPO"), BOOTSTRAP_SEED)["tests"]
    assert made["sft_to_dpo"]["tests"] == paired and paired["mine"]["difference"] < 0
    page = unescape((workplace / "report.html").read_text()).replace("\u00a0", " ")
    section = page.split('<section id="tests">')[1].split("</section>")[0]
    assert re.findall(r'<tr><th scope="row">(\w+)</th>', section) == 2 * ["Platinum", "svamp", "mine"]
    for test, one in paired.items():
        assert f"<td>{100 * one['difference']:+.1f} points<" in section
        assert f"<p>SFT → DPO on {test}: {one['verdict']}.</p>" in page
    text = table_text()
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.split() for line in text.split("Other test sets")[1].splitlines()]
    (line,) = [line for line in lines if line[:1] == ["mine"]]
    accuracies = [metrics_of_tests(rows[name], 1)["tests"]["mine"]["accuracy"] for name in RATES]
    assert [line[1], line[2], line[3], line[6]] == ["40", *(f"{100 * one:.1f}" for one in accuracies)]
    assert line[7] == f"{100 * paired['mine']['difference']:+.1f}"
    rows_shown = [line[0] for line in lines if line and line[0] in ("Platinum", "svamp", "mine")]
    assert rows_shown == ["Platinum", "svamp", "mine"]


def test_the_table_of_test_sets_fits(workplace: Path) -> None:
    """Also with the longest name and the widest figures."""
    put_tests(workplace)
    report.main()
    name = "a-name-of-14-l"
    step = {"difference": -0.5555, "p": 1e-9}
    for policy in RATES:
        path = workplace / f"metrics/platinum_details/{policy}.json"
        wide = {"tests": {name: {"accuracy": 1.0, "questions": 10552}}}
        write_json(path, json.loads(path.read_text()) | wide)
    path = workplace / "metrics/comparison.json"
    made = json.loads(path.read_text())
    write_json(path, {key: value | {"tests": {name: step}} for key, value in made.items()})
    text = table_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert re.search(name + r" +10,552 +100\.0 +100\.0 +-55\.5 +<0\.0001 +100\.0 +-55\.5 +<0\.0001", text)


def test_votes_are_compared_from_policy_to_policy(workplace: Path) -> None:
    """coherent@k of the same questions, paired: on the page and in the words below the table."""
    votes = {}
    for name in RATES:
        put_votes(workplace, name)
        votes[name] = [{"id": row["id"], "coherent": float(row["correct"])} for row in rows_of(name)]
        write_jsonl(workplace / f"data/votes/{name}.jsonl", votes[name])
    report.main()
    made = json.loads((workplace / "metrics/comparison.json").read_text())["sft_to_dpo"]["coherent"]
    assert made == compare_votes(votes["sft"], votes["dpo"], ("SFT", "DPO"), BOOTSTRAP_SEED)["coherent"]
    section = (
        (workplace / "report.html").read_text().split('aria-label="Votes, paired"')[1].split("</table>")[0]
    )
    assert section.count('<tr><th scope="row">') == 3
    assert f"<td>{100 * made['difference']:+.1f} points<" in section
    words = " ".join(table_text().split())
    assert f"coherent@4 {100 * made['difference']:+.1f} points: {made['verdict']}" in words


def test_the_table_of_twins_fits(workplace: Path) -> None:
    """Also when every figure is as wide as it can be."""
    report.main()
    step = {"difference": -0.5555, "p": 1e-9}
    wide = {"changed": 1.0, "changed_low": 0.9961, "changed_high": 1.0, "both": 1.0, "kept": 1.0}
    for name in RATES:
        path = workplace / f"metrics/platinum_details/{name}.json"
        write_json(path, json.loads(path.read_text()) | wide | {"changed_questions": 1209})
    path = workplace / "metrics/comparison.json"
    made = json.loads(path.read_text())
    write_json(path, {key: value | {"changed": step, "both": step} for key, value in made.items()})
    text = table_text()
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("100.0 (99.6–100.0)   -55.5  <0.0001  100.0   -55.5  <0.0001  100.0") == 2


def test_a_training_that_changed_nothing_is_loud(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On top of the page, in the table, and when the stage ends; the luck of the best look is told beside it."""
    kept = put_kept(workplace, "dpo", "the SFT adapter", [0] * 20, [1] * 12 + [0] * 8)
    report.main()
    page = (workplace / "report.html").read_text().replace("\u00a0", " ")
    assert "KEPT STEP 0" not in page and 'class="warn"' not in page and LUCK in page
    assert f"<p>DPO {kept}.</p>" in page.split('<section id="training">')[1]
    shown = " ".join(table_text().split())
    assert f"DPO {kept}. {LUCK}" in shown and "step 0" not in shown and "WARNING" not in shown

    none = put_kept(workplace, "sft", "the base policy", [1] * 12 + [0] * 8, [1] * 13 + [0] * 7)
    capsys.readouterr()
    report.main()
    page = (workplace / "report.html").read_text().replace("\u00a0", " ")
    top = page.split("<nav")[0]
    assert "A training changed nothing" in top and f"<li>SFT {none}.</li>" in top and kept not in top
    assert f"WARNING SFT {none}." in " ".join(capsys.readouterr().err.split())
    text = table_text()
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"(?m)^ +SFT, step 0 ", text) and re.search(r"(?m)^ +DPO ", text)
    assert f"WARNING SFT {none}. DPO {kept}." in " ".join(text.split())


def test_page_without_votes(workplace: Path) -> None:
    """Not voted yet, or without samples."""
    report.main()
    assert 'id="votes"' not in (workplace / "report.html").read_text()
    write_json(workplace / "metrics/vote_details/sft.json", {"questions": 0})
    report.main()
    assert 'id="votes"' not in (workplace / "report.html").read_text()
    assert "elect" not in table_text()


def test_page_of_one_policy(workplace: Path) -> None:
    for name in ("base", "dpo"):
        (workplace / f"data/platinum_eval/{name}.jsonl").unlink()
    report.main()
    assert "Only one policy was evaluated" in (workplace / "report.html").read_text()
    assert json.loads((workplace / "metrics/comparison.json").read_text()) == {}


def test_page_without_samples(workplace: Path) -> None:
    for name in RATES:
        rows = rows_of(name)
        for row in rows:
            del row["samples"]
        put(workplace, name, rows)
    report.main()
    assert "mean@8" not in (workplace / "report.html").read_text()
    rows = csv.DictReader((workplace / "metrics/plots/policies.csv").read_text().splitlines())
    assert [row["mean"] for row in rows] == ["", "", ""]


def test_no_evaluation_is_one_clear_line(workplace: Path) -> None:
    shutil.rmtree(workplace / "data")
    with pytest.raises(UserError, match=r"holds none of base\.jsonl, sft\.jsonl, dpo\.jsonl"):
        report.main()


def test_unhealthy_generations_are_loud(workplace: Path) -> None:
    put(workplace, "dpo", rows_of("dpo", leak=True, finish="length"))
    report.main()
    page = (workplace / "report.html").read_text()
    assert page.count("These generations are not healthy") == 1
    assert "DPO: 100.0% of the completions hold pieces of the prompt" in page


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("samples: 4", "samples: 8", "evaluate@sft: evaluate.samples was 4 when it ran, dvc.lock says 8"),
        ("samples: 4", "top_p: 1.0", "evaluate@sft: evaluate.top_p was null when it ran, dvc.lock says 1.0"),
        (
            "evaluate@sft",
            "evaluate@dpo",
            "has a manifest (data/platinum_eval/sft.manifest.json) and no entry",
        ),
    ],
)
def test_manifests_that_differ_from_files_and_lock_are_shown(
    workplace: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, words: str
) -> None:
    """On the page, and changed outputs in the terminal too."""
    add_everything(workplace)
    (workplace / "a").write_text("edited by hand")
    lock = workplace / "dvc.lock"
    lock.write_text(lock.read_text().replace(old, new))
    report.main()
    page = (workplace / "report.html").read_text()
    assert "Manifests, files and dvc.lock do not agree" in page
    assert words in page
    changed = "a, written by evaluate@sft, differs from what lies here now"
    assert changed in page and f"WARNING {changed}" in capsys.readouterr().err


def test_a_damaged_lock_is_one_clear_line(workplace: Path) -> None:
    (workplace / "dvc.lock").write_text("stages: [")
    with pytest.raises(UserError, match=r"^dvc\.lock: cannot be read"):
        report.main()


def test_page_stays_small(workplace: Path) -> None:
    """1,209 questions with very long reasoning still make a page under 5 MB; what was left out is said, the
    questions that changed are all there, and each completion keeps its end."""
    for name in RATES:
        rows = rows_of(name, n=1209)
        for row in rows:
            row["completion"] = "reasoning " * 900 + row["completion"]
        write_jsonl(workplace / f"data/platinum_eval/{name}.jsonl", rows)
    report.main()
    page = (workplace / "report.html").read_bytes()
    assert len(page) < 5_000_000
    data = json.loads(page.split(b'type="application/json">')[1].split(b"</script>")[0])
    right = {name: [row["correct"] for row in rows_of(name, n=1209)] for name in RATES}
    changed = sum(len(set(kinds)) > 1 for kinds in zip(*right.values(), strict=True))
    assert data["left_out"] + len(data["rows"]) == 1209
    assert sum(len(set(row["right"])) > 1 for row in data["rows"]) == changed
    assert all("characters left out" in row["text"][2] and "####" in row["text"][2] for row in data["rows"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


COUNT = "[at('list').children.length, found.length]"
WIDE = "document.documentElement.scrollWidth - innerWidth"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_page_in_a_browser(workplace: Path, browser: Browser, width: int, dark: bool) -> None:
    """Search and filter find what they should; an opened question shows both completions as text, side by side or
    one below the other; nothing is wider than the window; only the page itself is asked for; no complaints."""
    add_everything(workplace)
    report.main()
    address = (workplace / "report.html").as_uri()
    page = browser.open(address, width=width, dark=dark)
    comparison = json.loads((workplace / "metrics/comparison.json").read_text())["sft_to_dpo"]
    changed = comparison["gained"] + comparison["lost"]

    def filter_by(field: str, value: str) -> Any:
        page.run(f"at({field!r}).value = {value!r}; at('filters').dispatchEvent(new Event('input'))")
        return page.run(COUNT)

    assert page.run(COUNT) == [min(20, changed), changed]
    assert filter_by("show", "gained")[1] == comparison["gained"]
    assert filter_by("show", "lost")[1] == comparison["lost"]
    assert filter_by("show", "all") == [20, 60]
    page.run("at('more').click()")
    assert page.run(COUNT) == [40, 60]
    assert filter_by("search", "zoë pears") == [0, 0]
    assert filter_by("search", "zoë APPLES platinum-00017") == [1, 1]
    page.run("at('list').firstChild.open = true")
    page.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))")
    texts = page.run("[...at('list').querySelectorAll('pre')].map(pre => pre.textContent)")
    assert texts == [rows_of(name)[17]["completion"] for name in ("sft", "dpo")]
    tops = page.run("[...at('list').querySelectorAll('pre')].map(pre => pre.getBoundingClientRect().top)")
    assert (tops[0] == tops[1]) == (width == 1280)
    marked = page.run("[...at('list').querySelectorAll('mark')].map(mark => mark.textContent)")
    assert any("sft" in words for words in marked) and any("dpo" in words for words in marked)
    assert page.run("at('list').querySelectorAll('img').length") == 0
    assert page.run(WIDE) <= 0
    style = "getComputedStyle(document.body)"
    text, background = (
        sum(map(int, re.findall(r"\d+", page.run(f"{style}.{name}"))))
        for name in ("color", "backgroundColor")
    )
    assert (text > background) == dark
    assert set(page.requests()) <= {address, "data:,"}
    assert page.complaints() == []


# --- the table


def table_text() -> str:
    out = StringIO()
    print_results(Console(file=out, width=80, force_terminal=False))
    return out.getvalue()


def test_table_says_it_all_in_80_columns(workplace: Path) -> None:
    put(workplace, "base", rows_of("base", finish="length"))
    report.main()
    text = table_text()
    assert max(map(len, text.splitlines())) <= 80
    metrics = json.loads((workplace / "metrics/platinum_details/dpo.json").read_text())
    comparison = json.loads((workplace / "metrics/comparison.json").read_text())["sft_to_dpo"]
    line = next(line for line in text.splitlines() if line.strip().startswith("DPO"))
    assert f"{100 * metrics['accuracy']:.1f} % (" in line
    assert f"{100 * comparison['difference']:+.1f}" in line
    assert f"{100 * metrics['mean_at_4']:.1f} %" in line
    assert comparison["verdict"] in " ".join(text.split())
    assert "WARNING base: 100.0% of the completions were cut at the token limit" in text
    for place in ("report.html", "dvc metrics show", "dvc plots show"):
        assert place in text


def test_table_of_the_votes(workplace: Path) -> None:
    vote = put_votes(workplace, "sft")
    text = table_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert "The answer that 4 samples elect, weighted by s_cf, in percent" in text
    line = next(line for line in text.split("elect")[1].splitlines() if line.strip().startswith("SFT"))
    keys = ("maj_at_4", "coherent_at_4", "difference", "control_difference", "pass_at_4")
    found = [float(cell) for cell in re.findall(r"(?<![(–.\d])[+-]?\d+\.\d(?!\d)", line)]
    assert found[:3] == [round(100 * vote[key], 1) for key in keys[:3]]
    assert found[-2:] == [round(100 * vote[key], 1) for key in keys[3:]]


def test_table_needs_only_the_metrics(workplace: Path) -> None:
    """Before the report has run, and with policies missing, the table shows what there is."""
    (workplace / "metrics/platinum_details/sft.json").unlink()
    text = table_text()
    assert "base" in text and "DPO" in text and "SFT" not in text


def test_table_of_nothing(workplace: Path) -> None:
    shutil.rmtree(workplace / "metrics")
    with pytest.raises(UserError, match="no results yet"):
        print_results()


def test_a_round_that_kept_its_start_has_the_starts_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its best look was better, but not by the test; the table goes by what is kept."""
    monkeypatch.chdir(tmp_path)
    scores = {"last": 16, "score_start": 0.5, "score_best": 0.6}
    KEPT.mkdir(parents=True)
    for name, kept in (("round1", 0), ("dpo", 8)):
        write_json(KEPT / f"{name}.json", {"kept": kept, **scores})
    starts = {"round1": "checkpoints/sft_lora", "dpo": "checkpoints/dpo_coherence_lora/round1"}
    first, second = facts._rounds(starts)
    assert (first["kept"], first["score"], first["from_score"]) == (0, 0.5, 0.5)
    assert (second["kept"], second["score"], second["steps"]) == (8, 0.6, 16)
