"""headline copies one policy's metrics to a fixed path, and says plainly when it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from stages import headline
from stages.run.errors import UserError

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with this project's parameters and three policies' metrics, as working directory."""
    shutil.copy(REPO / "params.yaml", tmp_path)
    shutil.copytree(REPO / "profiles", tmp_path / "profiles")
    for number, name in enumerate(("base", "sft", "dpo")):
        path = tmp_path / "metrics" / "platinum" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"accuracy": 0.1 + number / 3, "accuracy_low": 0.05, "mean_at_8": 0.25}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_policy(workplace: Path, policy: str) -> None:
    params = workplace / "params.yaml"
    text = params.read_text()
    assert "  policy: dpo" in text
    params.write_text(text.replace("  policy: dpo", f"  policy: {policy}"))


@pytest.mark.parametrize("policy", ["base", "sft", "dpo"])
def test_headline_is_the_chosen_policys_metrics(workplace: Path, policy: str) -> None:
    """No figure is changed or rounded on the way."""
    set_policy(workplace, policy)
    headline.main()
    copied = json.loads((workplace / "metrics/headline.json").read_text())
    assert copied == json.loads((workplace / f"metrics/platinum/{policy}.json").read_text())
    bars = (workplace / "metrics/headline.csv").read_text()
    assert bars == f"metric,share\naccuracy,{copied['accuracy']}\nmean_at_8,0.25\n"


def test_other_test_sets_are_bars_of_their_own(workplace: Path) -> None:
    path = workplace / "metrics/platinum/dpo.json"
    path.write_text(json.dumps({"accuracy": 0.5, "tests": {"svamp": 0.75, "mine": 0.25}}))
    headline.main()
    assert json.loads((workplace / "metrics/headline.json").read_text())["tests"]["svamp"] == 0.75
    bars = (workplace / "metrics/headline.csv").read_text()
    assert bars == "metric,share\naccuracy,0.5\ntests.svamp,0.75\ntests.mine,0.25\n"


def test_headline_names_a_policy_that_was_not_evaluated(workplace: Path) -> None:
    (workplace / "metrics/platinum/dpo.json").unlink()
    with pytest.raises(
        UserError, match=r"dpo\.json: is missing.*evaluated: base, sft.*dvc repro evaluate@dpo"
    ):
        headline.main()
    assert not (workplace / "metrics/headline.json").exists()


@pytest.mark.parametrize(
    ("damage", "words"), [("{", "damaged JSON"), ("[]", "no 'accuracy'"), ("{}", "no 'accuracy'")]
)
def test_headline_keeps_the_old_file_when_the_metrics_are_damaged(
    workplace: Path, damage: str, words: str
) -> None:
    headline.main()
    before = (workplace / "metrics/headline.json").read_bytes()
    (workplace / "metrics/platinum/dpo.json").write_text(damage)
    with pytest.raises(UserError, match=words):
        headline.main()
    assert (workplace / "metrics/headline.json").read_bytes() == before
