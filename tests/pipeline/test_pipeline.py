"""A whole run of the pipeline: its outputs, their manifests, what people see, and no network.

All tests look at one small real run (conftest.py). How good its models are does not matter here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ruamel.yaml import YAML

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.pipeline

REPO = Path(__file__).resolve().parents[2]
POLICIES = ["base", "sft", "dpo"]
NO_MODEL = ["prepare", "coherence", "preference", "vote sft", "headline", "report"]
STAGES = "prepare base sft rollout coherence preference dpo evaluate vote headline report".split()
TOOLS = "check results plan runs grade compare ask explain pairs suspects trace export remote".split()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def profile(project: Project) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in ("params.yaml", "profiles/tiny.yaml"):
        values |= YAML(typ="safe").load((project.root / name).read_text(encoding="utf-8"))
    return values


def declared_outputs(project: Project) -> list[str]:
    """All outs, metrics and plots of dvc.yaml, those of each policy and each round filled in."""
    stages = YAML(typ="safe").load((project.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    outputs = []
    for stage in stages.values():
        keys = {"${policies}": POLICIES, "${rounds}": POLICIES[-1:]}.get(stage.get("foreach", ""), [""])
        stage = stage.get("do", stage)
        for kind in ("outs", "metrics", "plots"):
            names = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in stage.get(kind, [])]
            outputs += [name.replace("${key}", key) for name in names for key in keys]
    return outputs


def manifests(project: Project) -> list[Path]:
    return [
        path
        for folder in ("data", "checkpoints", "metrics", ".")
        for path in (project.root / folder).glob("*manifest.json" if folder == "." else "**/*manifest.json")
    ]


# ---- outputs -----------------------------------------------------------------------------------------


def test_nothing_but_declared_outputs_was_written(small_run: Project) -> None:
    """Every file that a run adds is an output that dvc.yaml declares."""
    tracked = small_run.run("git", "diff", "--name-only", "--diff-filter=A", "HEAD~1", "HEAD").stdout.split()
    known = [*declared_outputs(small_run), "dvc.lock"]
    strangers = [
        name
        for name in tracked
        if not name.endswith(".gitignore")
        and not any(name == one or name.startswith(f"{one}/") for one in known)
    ]
    assert strangers == []
    assert small_run.run("git", "status", "--porcelain").stdout == ""


def test_row_counts_follow_the_parameters(small_run: Project) -> None:
    params, data = profile(small_run), small_run.root / "data"
    for split in ("train", "valid", "platinum"):
        assert len(rows_of(data / f"gsm8k/{split}.jsonl")) == params["data"][split]
    rollouts = rows_of(data / "rollouts/dpo.jsonl")
    assert len(rollouts) == params["rollout"]["questions"]
    for row in rollouts:
        assert [one["arm"] for one in row["trajectories"]] == list(params["rollout"]["arms"])
        assert [one["id"] for one in row["trajectories"]] == [f"{row['id']}/{k}" for k in range(8)]
        assert all(one["finish"] in ("stop", "length") and one["logprob"] < 0 for one in row["trajectories"])
    scored = rows_of(data / "regime_w_rollouts/dpo.jsonl")
    assert [row["id"] for row in scored] == [row["id"] for row in rollouts]
    for policy in POLICIES:
        rows = rows_of(data / f"platinum_eval/{policy}.jsonl")
        assert [row["id"] for row in rows] == [row["id"] for row in rows_of(data / "gsm8k/platinum.jsonl")]
        assert all(len(row["samples"]) == params["evaluate"]["samples"] for row in rows)
        twins = rows_of(data / "gsm8k/changed.jsonl")
        asked = [(twin["id"], twin["question"], twin["gold"]) for row in rows for twin in row["twins"]]
        assert asked == [(twin["id"], twin["question"], twin["gold"]) for twin in twins] != []
        asked = [(row["id"], row["test"]) for row in rows_of(data / f"tests_eval/{policy}.jsonl")]
        assert asked == [(row["id"], row["test"]) for row in rows_of(data / "gsm8k/tests.jsonl")] != []
        assert [row["id"] for row in rows_of(data / f"votes/{policy}.jsonl")] == [row["id"] for row in rows]


def test_records_have_the_documented_fields_in_order(small_run: Project) -> None:
    data = small_run.root / "data"
    rollout, scored = (
        rows_of(data / "rollouts/dpo.jsonl")[0],
        rows_of(data / "regime_w_rollouts/dpo.jsonl")[0],
    )
    assert list(rollout) == ["id", "question", "gold", "solution", "trajectories"]
    signals = ["s_end", "s_path", "s_cf", "s_wm"]
    every = rows_of(data / "rollouts/dpo.jsonl")
    assert set(scored) == {*rollout, *signals, "suspicion", "suspect", "suspect_answer"}
    assert all(list(row) in ([*rollout], [*list(rollout)[:4], "planted", "trajectories"]) for row in every)
    assert set(scored["trajectories"][0]) >= {"answer", "correct", "fault", "soundness", *signals, "reward"}
    evaluated = rows_of(data / "platinum_eval/dpo.jsonl")[0]
    assert list(evaluated) == [
        "id", "question", "gold", "completion", "answer", "correct", "flexible_answer", "flexible_correct",
        "tokens", "finish", "leak", "answers_found", "samples", "twins",
    ]  # fmt: skip
    twin = next(twin for row in rows_of(data / "platinum_eval/dpo.jsonl") for twin in row["twins"])
    assert list(twin) == ["id", "question", "gold", "completion", "answer", "correct", "tokens", "finish"]
    other = rows_of(data / "tests_eval/dpo.jsonl")[0]
    assert list(other) == ["test", *(name for name in evaluated if name not in ("samples", "twins"))]
    assert list(evaluated["samples"][0]) == ["completion", "answer", "correct", "tokens", "finish", "logprob"]
    pair = rows_of(data / "coherence_preferences/dpo.jsonl")[0]
    assert list(pair)[:13] == [
        "id", "kind", "question_id", "prompt", "chosen", "rejected", "chosen_id", "rejected_id",
        "chosen_reward", "rejected_reward", "margin", "chosen_tokens", "rejected_tokens",
    ]  # fmt: skip


def test_held_out_questions_are_in_no_training_data(small_run: Project) -> None:
    data = small_run.root / "data"
    held_out = {
        row["question"]
        for name in ("platinum", "changed", "tests")
        for row in rows_of(data / f"gsm8k/{name}.jsonl")
    }
    trained = {
        row["question"] for split in ("train", "valid") for row in rows_of(data / f"gsm8k/{split}.jsonl")
    }
    rolled = {row["question"] for row in rows_of(data / "rollouts/dpo.jsonl")}
    paired = {row["prompt"] for row in rows_of(data / "coherence_preferences/dpo.jsonl")}
    assert paired <= rolled <= trained
    assert not held_out & trained


def test_no_output_holds_a_path_or_the_name_of_this_machine(small_run: Project) -> None:
    """The same run gives the same bytes anywhere."""
    places = [str(small_run.root).encode(), sys.prefix.encode(), os.uname().nodename.encode()]
    for name in declared_outputs(small_run):
        path = small_run.root / name
        for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
            found = [place for place in places if len(place) > 3 and place in file.read_bytes()]
            assert not found, f"{file}: {found}"


# ---- manifests ---------------------------------------------------------------------------------------


def test_manifests_match_the_files_and_cover_every_output(small_run: Project) -> None:
    covered = set()
    for path in manifests(small_run):
        manifest = json.loads(path.read_text())
        for name, digest in manifest["outputs"].items():
            assert sha256(small_run.root / name) == digest, f"{path}: {name}"
            covered.add(name)
        for name, digest in manifest["inputs"].items():
            source = small_run.root / name
            assert sha256(source / "manifest.json" if source.is_dir() else source) == digest, (
                f"{path}: {name}"
            )
    for name in declared_outputs(small_run):
        if not name.endswith("manifest.json"):
            assert any(one == name or one.startswith(f"{name}/") for one in covered), (
                f"no manifest covers {name}"
            )


# ---- what people see ---------------------------------------------------------------------------------


def test_metrics_show_is_a_readable_table(small_run: Project) -> None:
    lines = small_run.run("dvc", "metrics", "show", COLUMNS="200").stdout.splitlines()
    header = lines[0].split()
    assert header[0] == "Path"
    assert {
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "mean_at_4",
        "maj_at_4",
        "coherent_at_4",
        "changed",
        "both",
    } <= set(header)
    assert len(header) <= 16, "more columns than a person can read"
    paths = [line.split()[0] for line in lines[1:]]
    for kind in ("platinum", "vote"):
        assert {path for path in paths if kind in path} == {f"metrics/{kind}/{p}.json" for p in POLICIES}
    for line in lines[1:]:
        assert len(line.split()) == len(header)


def test_sft_and_dpo_are_compared_by_dvcs_own_command(copy_run: Callable[[], Project]) -> None:
    """Two experiments that differ only in headline.policy compare SFT with DPO by `dvc metrics diff`."""
    project = copy_run()
    for policy in ("sft", "dpo"):
        done = project.run("dvc", "exp", "run", "--name", policy, "-S", f"headline.policy={policy}")
        assert set(re.findall(r"Running stage '([^']+)'", done.stdout)) <= {"headline"}
    shown = project.run(
        "dvc", "metrics", "diff", "--all", "--json", "sft", "dpo", "--targets", "metrics/headline.json"
    )
    diff = json.loads(shown.stdout)["metrics/headline.json"]["accuracy"]
    sft, dpo = (json.loads((project.root / f"metrics/platinum/{p}.json").read_text()) for p in ("sft", "dpo"))
    assert (diff["old"], diff["new"]) == (sft["accuracy"], dpo["accuracy"])
    figures = json.loads(project.run("dvc", "plots", "diff", "--json", "sft", "dpo").stdout)["data"]
    (figure,) = figures["The headline policy"]
    assert set(figure["revisions"]) == {"sft", "dpo"}
    points = figure["content"]["data"]["values"]
    bars = [(bar["rev"], float(bar["share"])) for bar in points if bar["metric"] == "accuracy"]
    assert sorted(bars) == [("dpo", dpo["accuracy"]), ("sft", sft["accuracy"])]
    drawn = project.run("dvc", "plots", "diff", "sft", "dpo").stdout
    assert (project.root / "dvc_plots/index.html").is_file(), drawn


def test_sft_and_dpo_are_compared_by_tags_also_in_a_fresh_clone(copy_run: Callable[[], Project]) -> None:
    """The same with commits and tags. A clone without the DVC cache has all that the diff needs."""
    project = copy_run()
    for policy in ("sft", "dpo"):
        project.update("params.yaml", {"headline.policy": policy})
        assert set(project.repro("headline")) <= {"headline"}
        project.run("git", "add", "--all")
        who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false"]
        project.run("git", *who, "commit", "--quiet", "--allow-empty", "--message", policy)
        project.run("git", "tag", policy)
    clone = dataclasses.replace(project, root=project.root.parent / "clone")
    project.run("git", "clone", "--quiet", str(project.root), str(clone.root))
    sft, dpo = (json.loads((project.root / f"metrics/platinum/{p}.json").read_text()) for p in ("sft", "dpo"))
    for place in (project, clone):
        shown = place.run(
            "dvc", "metrics", "diff", "--all", "--json", "sft", "dpo", "--targets", "metrics/headline.json"
        )
        diff = json.loads(shown.stdout)["metrics/headline.json"]
        assert (diff["accuracy"]["old"], diff["accuracy"]["new"]) == (sft["accuracy"], dpo["accuracy"])
        assert (diff["mean_at_4"]["old"], diff["mean_at_4"]["new"]) == (sft["mean_at_4"], dpo["mean_at_4"])


def test_results_are_printed_as_a_table(small_run: Project) -> None:
    shown = small_run.stages("results", COLUMNS="80").stdout
    for policy in POLICIES:
        accuracy = json.loads((small_run.root / f"metrics/platinum/{policy}.json").read_text())["accuracy"]
        name = policy if policy == "base" else policy.upper()
        assert re.search(rf"{name}(, step 0)? +{100 * accuracy:.1f} %", shown), shown
    assert "mean@4" in shown
    assert "report.html" in shown


def test_the_report_shows_every_curve_and_policy(small_run: Project) -> None:
    page = (small_run.root / "report.html").read_text(encoding="utf-8")
    for title in (
        "SFT: loss", "SFT: gradient norm", "DPO: loss", "DPO: reward margin", "DPO: log-probabilities",
        "DPO: gradient norm", "DPO: accuracy on the validation split",
    ):  # fmt: skip
        assert title in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), (
        "the page loads something from the network"
    )


def test_help_lists_every_stage_and_tool_with_a_line_each(small_project: Project) -> None:
    shown = small_project.stages("--help").stdout
    for name in (*STAGES, *TOOLS):
        assert re.search(rf"^\W*{name}\s+\w.{{15,}}", shown, re.MULTILINE), f"{name} is not listed:\n{shown}"


def test_check_passes_and_shows_the_first_prompts(small_run: Project) -> None:
    shown = small_run.stages("check").stdout
    first = rows_of(small_run.root / "data/gsm8k/train.jsonl")[0]["question"]
    assert shown.count(first) >= 4  # sft, two styles of rollout, dpo, evaluate
    assert "OK" in shown


# ---- speed, network ----------------------------------------------------------------------------------


def test_a_stage_without_a_model_imports_no_heavy_library(copy_run: Callable[[], Project]) -> None:
    """What it writes is what the run wrote, in a process that shares no seed of hashes with it."""
    project = copy_run().cold
    for name in NO_MODEL:
        code = (
            f"import sys; sys.argv = ['stages', *{name.split()!r}]\n"
            "from stages.__main__ import main\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
            "heavy = {'torch', 'transformers', 'trl', 'datasets', 'pandas', 'matplotlib'}\n"
            "print(*(heavy & set(sys.modules)))"
        )
        assert project.run("python", "-c", code).stdout.split() == [], name
    assert project.status() == {}


def test_nothing_tried_to_reach_the_network(small_run: Project) -> None:
    """A guard in every process of the run refuses connections and notes them. It does so here."""
    assert not (small_run.guard / "attempts").exists()
    for project in (small_run, small_run.cold):
        for tried in ("create_connection(('127.0.0.1', 9), timeout=1)", "getaddrinfo('localhost', 80)"):
            code = f"import os, socket; os.environ['NETWORK_ATTEMPTS'] = os.devnull; socket.{tried}"
            done = project.run("python", "-c", code, check=False)
            assert "the tests run without a network" in done.stderr


def test_the_whole_pipeline_ran_with_the_network_cut(small_run: Project, cut: list[str]) -> None:
    """All stages ran in a network namespace without an interface, where not even this machine can be reached."""
    if not cut:
        pytest.skip("this machine does not let a user make a network namespace (unshare)")
    assert len(list(manifests(small_run))) == 15
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = f"socket.create_connection({server.getsockname()!r}, timeout=5)"
        up = "[name for _, name in socket.if_nameindex() if open(f'/sys/class/net/{name}/operstate').read() == 'up']"
        code = f"import os, socket\nos.environ['LOOPBACK_ALLOWED'] = '1'\ntry:\n    {reach}\n    print('reached')\n"
        code += f"except OSError:\n    print('cut off', {up})"
        here = small_run.cold.run("python", "-c", code)
        there = small_run.run(*([] if small_run.warm else cut), "python", "-c", code)
    assert here.stdout == "reached\n"
    assert there.stdout == "cut off []\n"


@pytest.mark.parametrize("network", [False, True])
def test_libraries_stay_offline_and_send_no_figures(network: bool, small_project: Project) -> None:
    """Only prepare and base may reach the hub. Telemetry is always off."""
    code = (
        f"from stages.run.process import prepare_process; prepare_process(network={network})\n"
        "import os, huggingface_hub.constants as hub, datasets.config as data\n"
        "print(hub.HF_HUB_OFFLINE, data.HF_HUB_OFFLINE, hub.HF_HUB_DISABLE_TELEMETRY)\n"
        "print(os.environ['DO_NOT_TRACK'], os.environ['RAY_USAGE_STATS_ENABLED'])"
    )
    offline = str(not network)
    assert small_project.cold.run("python", "-c", code).stdout.split() == [offline, offline, "True", "1", "0"]


def test_an_evaluation_run_again_gives_the_same_bytes(copy_run: Callable[[], Project]) -> None:
    """Its log is one line from the stage, and none from libraries."""
    project = copy_run()
    outputs = [project.root / f"data/platinum_eval/sft{end}" for end in (".jsonl", ".manifest.json")]
    outputs += [project.root / f"metrics/{folder}/sft.json" for folder in ("platinum", "platinum_details")]
    before = [sha256(path) for path in outputs]
    for path in outputs:
        path.unlink()
    done = project.stages("evaluate", "sft")
    assert done.stdout == ""
    assert re.fullmatch(r"evaluate@sft  [\d.]+% of 60 questions answered right  \d+ s\n", done.stderr), (
        done.stderr
    )
    assert [sha256(path) for path in outputs] == before


def test_the_page_finds_manifests_and_lock_in_agreement(small_run: Project) -> None:
    """`report` compares what each stage read with what DVC recorded. In an undisturbed run nothing differs."""
    page = (small_run.root / "report.html").read_text(encoding="utf-8")
    assert "evaluate@dpo" in page
    assert "dvc.lock records differ" not in page


def test_sft_on_wrong_labels_keeps_the_base(copy_run: Callable[[], Project]) -> None:
    """It says so, and the adapter kept gives the base's answers; an adapter that adds 0 may round a last digit anew."""
    project = copy_run()
    changes = {"data.wrong_labels": 1.0, "sft.select.level": 0.05}
    project.update("profiles/tiny.yaml", changes)
    done = project.run("dvc", "repro", "evaluate@sft")
    kept = json.loads((project.root / "metrics/kept/sft.json").read_text())
    assert (kept["kept"], kept["last"], kept["looks"]) == (0, 30, 1)
    assert "KEPT STEP 0, the base policy: no step is better on validation" in " ".join(done.stderr.split())
    base, sft = (
        re.sub(
            r'"logprob":[^,}]+',
            "",
            (project.root / f"data/platinum_eval/{policy}.jsonl").read_text(encoding="utf-8"),
        )
        for policy in ("base", "sft")
    )
    assert sft == base
