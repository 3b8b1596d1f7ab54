"""What `make` says at its end: whether this run's outputs are those of the committed one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.tools.repro import committed_line, wait_for


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A committed dvc.lock of two stages; returns its content."""
    monkeypatch.chdir(tmp_path)
    params = {"profiles/tiny.yaml": {"sft": {"epochs": 1}}}
    content = {
        "schema": "2.0",
        "stages": {
            "prepare": {
                "cmd": "python3 -m stages prepare",
                "deps": [{"path": "stages/prepare.py", "md5": "c0de"}],
                "outs": [{"path": "data/gsm8k", "md5": "da7a.dir"}],
            },
            "sft": {
                "cmd": "python3 -m stages sft",
                "deps": [{"path": "data/gsm8k/train.jsonl", "md5": "7ea1"}],
                "params": params,
                "outs": [{"path": "checkpoints/sft_lora", "md5": "ada9.dir"}],
            },
        },
    }
    write(content)
    who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "dvc.lock"], [*who, "commit", "-qm", "run"]):
        subprocess.run(["git", *command], check=True)
    return content


def write(content: dict) -> None:
    with Path("dvc.lock").open("w") as file:
        YAML().dump(content, file)


@pytest.mark.usefixtures("lock")
def test_the_same_outputs() -> None:
    assert committed_line().startswith("Same bytes")


def test_other_outputs_of_the_same_inputs_are_rounding(lock: dict) -> None:
    """What an earlier stage wrote is no input of one's own: that it differs follows from the first difference."""
    lock["stages"]["sft"]["outs"][0]["md5"] = "07e6.dir"
    write(lock)
    line = committed_line()
    assert line.startswith("Other bytes than the committed run, from sft on")
    assert "rounds" in line and "git checkout" in line


@pytest.mark.parametrize("what", ["code", "parameter", "stage"])
def test_another_question_is_not_compared(lock: dict, what: str) -> None:
    stages = lock["stages"]
    if what == "code":
        stages["prepare"]["deps"][0]["md5"] = "0the6"
    elif what == "parameter":
        stages["sft"]["params"]["profiles/tiny.yaml"]["sft"]["epochs"] = 2
    else:
        del stages["sft"]
    write(lock)
    assert committed_line().startswith("Parameters, code or data are not those of the committed run")


def test_no_commit_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert committed_line() == ""


@pytest.mark.usefixtures("lock")
def test_no_git_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert committed_line() == ""


def test_ctrl_c_waits_for_dvc_to_end_in_order() -> None:
    """It is not killed half a second later, as subprocess.run would do."""

    class Dvc:
        waited = 0

        def wait(self) -> int:
            self.waited += 1
            if self.waited == 1:
                raise KeyboardInterrupt
            return 130

    dvc = Dvc()
    with pytest.raises(KeyboardInterrupt):
        wait_for(dvc)  # type: ignore[arg-type]
    assert dvc.waited == 2
