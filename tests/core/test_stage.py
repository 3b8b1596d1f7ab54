"""stage_run: one run at a time, progress kept and never mixed up, manifests that say what came of what."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.core.errors import UserError
from stages.core.records import sha256_file
from stages.core.stage import StageRun, atomic_folder, last_runs, manifest_path, stage_run

REPO = Path(__file__).resolve().parents[2]
OUT, SIDE = Path("data/out.jsonl"), Path("metrics/out.json")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with this project's parameters and one input."""
    shutil.copy(REPO / "params.yaml", tmp_path)
    shutil.copytree(REPO / "profiles", tmp_path / "profiles")
    (tmp_path / "input.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(name: str, old: str, new: str) -> None:
    text = Path(name).read_text()
    assert old in text
    Path(name).write_text(text.replace(old, new, 1))


def work(sections: tuple[str, ...] = ("headline",), text: str = "1\n") -> StageRun:
    """A stage that writes two outputs."""
    with stage_run("headline", sections=sections, inputs=[Path("input.jsonl")], outputs=[OUT, SIDE]) as run:
        for path in (OUT, SIDE):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return run


def cut_off() -> None:
    """A run that is stopped after it wrote progress."""
    with stage_run(
        "headline", sections=("headline",), inputs=[Path("input.jsonl")], outputs=[OUT, SIDE]
    ) as run:
        run.work.mkdir(parents=True, exist_ok=True)
        (run.work / "journal").write_text("half done")
        raise KeyboardInterrupt


def interrupted() -> Path:
    """The progress folder of a run that was stopped; no other is there."""
    with pytest.raises(KeyboardInterrupt):
        cut_off()
    (folder,) = [path for path in Path(".work/headline").iterdir() if path.is_dir()]
    return folder


def test_manifest_holds_hashes_and_parameters(workplace: Path) -> None:
    work()
    manifest = json.loads((workplace / "data/out.manifest.json").read_text())
    assert manifest == {
        "stage": "headline",
        "params": {"headline": {"policy": "dpo"}},
        "inputs": {"input.jsonl": sha256_file(Path("input.jsonl"))},
        "outputs": {path.as_posix(): sha256_file(path) for path in (OUT, SIDE)},
    }


def test_manifest_is_the_same_for_the_same_run(workplace: Path) -> None:
    """Nothing of time, place or machine goes into an output."""
    work()
    first = manifest_path(OUT).read_bytes()
    time.sleep(1.1)
    work()
    assert manifest_path(OUT).read_bytes() == first
    assert str(workplace).encode() not in first


def test_manifest_of_a_folder_lies_inside() -> None:
    folder = Path("checkpoints/some")
    with (
        stage_run("headline", sections=(), inputs=[Path("input.jsonl")], outputs=[folder]),
        atomic_folder(folder) as fresh,
    ):
        (fresh / "weights").write_text("w")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["outputs"] == {"checkpoints/some/weights": sha256_file(folder / "weights")}
    with stage_run("headline", sections=(), inputs=[folder], outputs=[OUT]):  # and it stands for its folder
        OUT.parent.mkdir()
        OUT.write_text("")
    assert json.loads(manifest_path(OUT).read_text())["inputs"] == {
        folder.as_posix(): sha256_file(folder / "manifest.json")
    }


def test_undeclared_parameters_cannot_be_read() -> None:
    """What a stage reads is what reruns it."""
    run = work()
    assert run.params.headline.policy == "dpo"
    assert run.params.hardware.generation_batch > 0
    with pytest.raises(AttributeError, match="regime_w"):
        _ = run.params.regime_w


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("absent.jsonl", r"absent\.jsonl: is missing; run `dvc repro`"),
        ("folder", r"folder: has no manifest\.json"),
    ],
)
def test_a_missing_input_stops_before_any_work(path: str, words: str) -> None:
    Path("folder").mkdir()
    began = False
    with (
        pytest.raises(UserError, match=words),
        stage_run("headline", sections=(), inputs=[Path(path)], outputs=[OUT]),
    ):
        began = True
    assert not began


def test_one_run_of_a_stage_at_a_time() -> None:
    with stage_run("headline", sections=("headline",), inputs=[Path("input.jsonl")], outputs=[OUT, SIDE]):
        with pytest.raises(UserError, match="another run of this stage is going on"):
            work()
        for path in (OUT, SIDE):
            path.parent.mkdir()
            path.write_text("")
    work()  # the lock is let go


def test_variants_of_a_stage_may_run_side_by_side() -> None:
    OUT.parent.mkdir()
    OUT.write_text("")
    with (
        stage_run("evaluate", variant="sft", sections=(), inputs=[], outputs=[OUT]) as one,
        stage_run("evaluate", variant="dpo", sections=(), inputs=[], outputs=[OUT]) as other,
    ):
        assert one.work != other.work


def test_an_output_not_written_is_an_error_and_no_manifest() -> None:
    with (
        pytest.raises(RuntimeError, match=r"without writing data/out\.jsonl"),
        stage_run("headline", sections=(), inputs=[], outputs=[OUT]),
    ):
        pass
    assert not manifest_path(OUT).exists()


def test_progress_stays_after_a_kill_and_goes_after_success() -> None:
    folder = interrupted()
    assert (folder / "journal").read_text() == "half done"
    assert not manifest_path(OUT).exists()
    assert work().work == folder  # the same run finds it again
    assert not folder.exists()


@pytest.mark.parametrize(
    "other",
    [
        lambda: change("params.yaml", "  policy: dpo", "  policy: sft"),
        lambda: Path("input.jsonl").write_text("{}\n{}\n"),
    ],
    ids=["parameter", "input"],
)
def test_progress_of_another_run_is_never_used(other: object) -> None:
    folder = interrupted()
    other()  # type: ignore[operator]
    assert interrupted() != folder
    assert not folder.exists()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("params.yaml", "seed: 17", "seed: 18"),  # not read by this stage
        ("profiles/tiny.yaml", "generation_batch: ", "generation_batch: 1"),
        ("profiles/tiny.yaml", "hardware:", "hardware:  # a remark"),
    ],
)
def test_progress_outlives_what_does_not_matter(file: str, old: str, new: str) -> None:
    folder = interrupted()
    change(file, old, new)
    assert interrupted() == folder


def test_run_facts_are_noted_apart_from_the_outputs() -> None:
    work()
    facts = last_runs()[-1]
    assert facts["stage"] == "headline"
    assert facts["seconds"] >= 0
    assert facts["peak_memory_mib"] > 10
    assert "torch" in facts["versions"]


def test_what_a_kill_left_beside_the_outputs_goes() -> None:
    """Half-written outputs of a killed run would lie in folders that DVC hashes; others' files stay."""
    for name in ("data/.out.jsonl.123.tmp", "metrics/.out.json.123.tmp", "data/.other.jsonl.123.tmp"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("half")
    folder = Path("checkpoints/.some.123.tmp/deeper")
    folder.mkdir(parents=True)
    work()
    with (
        stage_run("headline", sections=(), inputs=[], outputs=[Path("checkpoints/some")]),
        atomic_folder(Path("checkpoints/some")),
    ):
        pass
    assert [path.as_posix() for path in Path().rglob("*.tmp")] == ["data/.other.jsonl.123.tmp"]


def test_progress_that_was_being_cleared_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the midst of clearing: what is left must not look like progress, whatever was removed first."""
    folder = interrupted()
    change("params.yaml", "  policy: dpo", "  policy: sft")

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            work()
    change("params.yaml", "  policy: sft", "  policy: dpo")
    assert not folder.exists()
    work()
    assert [path.name for path in Path(".work/headline").iterdir()] == ["lock"]


def test_an_output_that_cannot_be_written_stops_before_any_work() -> None:
    """A file where a folder should be."""
    OUT.parent.write_text("")
    began = False
    with (
        pytest.raises(UserError, match=r"data/out\.jsonl: cannot be written; check what \S+/data is"),
        stage_run("headline", sections=(), inputs=[], outputs=[OUT]),
    ):
        began = True
    assert not began


def test_damage_in_the_journal_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """On the screen, and in the run's facts."""

    def journalled(stop: bool) -> list[str]:
        with stage_run("headline", sections=(), inputs=[Path("input.jsonl")], outputs=[OUT]) as run:
            with run.journal() as journal:
                found = list(journal.records)
                journal.add({"id": f"q{len(found)}"})
                journal.add({"id": f"q{len(found) + 1}"})
                if stop:
                    raise KeyboardInterrupt
            OUT.parent.mkdir(exist_ok=True)
            OUT.write_text("")
        return found

    with pytest.raises(KeyboardInterrupt):
        journalled(stop=True)
    (journal,) = Path(".work/headline").glob("*/journal.jsonl")
    journal.write_text(journal.read_text().replace("q0", "q7"))
    assert journalled(stop=False) == ["q1"]
    assert "1 damaged records of an earlier run set aside in" in capsys.readouterr().err
    assert last_runs()[-1]["damaged_records"] == 1


def test_atomic_folder_replaces_all_or_nothing() -> None:
    target = Path("checkpoints/some")
    with atomic_folder(target) as fresh:
        (fresh / "a").write_text("old")

    def fail() -> None:
        with atomic_folder(target) as fresh:
            (fresh / "b").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in target.iterdir()] == ["a"]
    with atomic_folder(target) as fresh:
        (fresh / "c").write_text("new")
    assert [path.name for path in target.iterdir()] == ["c"]
    assert [path.name for path in target.parent.iterdir()] == ["some"]  # no temporary folder is left


def test_sigterm_ends_a_stage_in_order() -> None:
    """As an ordinary exit, so that journals are closed; afterwards SIGTERM means what it meant before."""
    before = signal.getsignal(signal.SIGTERM)

    def terminated() -> None:
        with stage_run("headline", sections=("headline",), inputs=[], outputs=[OUT]):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(SystemExit) as ended:
        terminated()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
@pytest.mark.parametrize("between", [False, True], ids=["direct", "a shell in between"])
def test_a_stage_ends_when_its_parent_is_killed(workplace: Path, between: bool) -> None:
    """Killing dvc must not leave a stage writing on, also where the shell that dvc uses stays its parent."""
    stage = (
        "import os, time; from pathlib import Path; from stages.core.stage import stage_run\n"
        "with stage_run('headline', sections=(), inputs=[], outputs=[Path('data/out.jsonl')]):\n"
        "    Path('pid').write_text(str(os.getpid())); time.sleep(60)\n"
    )
    Path("stage.py").write_text(stage)
    shell = f"{sys.executable} stage.py; true" if between else f"exec {sys.executable} stage.py"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run(['sh', '-c', {shell!r}])"],
        env={**os.environ, "PYTHONPATH": str(REPO), "DVC_STAGE": "headline"},
    )
    wait_for(lambda: Path("pid").is_file() and bool(Path("pid").read_text()))
    child = int(Path("pid").read_text())
    parent.kill()
    parent.wait()
    for _ in range(200):
        # An ended child that nobody has waited for yet is a zombie, Z.
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the stage was still running 10 s after its parent was killed")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
@pytest.mark.parametrize("between", [False, True], ids=["direct", "a shell in between"])
def test_a_stage_ends_when_its_parent_was_killed_while_it_started(workplace: Path, between: bool) -> None:
    """The imports of a stage take seconds; DVC may be gone before the stage can ask who its parent is."""
    stage = (
        "import os, time; from pathlib import Path; from stages.core.stage import stage_run\n"
        "Path('pid').write_text(str(os.getpid()))\n"
        "while not Path('go').exists(): time.sleep(0.01)\n"
        "with stage_run('headline', sections=(), inputs=[], outputs=[Path('data/out.jsonl')]):\n"
        "    Path('began').write_text('')\n"
    )
    Path("stage.py").write_text(stage)
    shell = f"{sys.executable} stage.py; true" if between else f"exec {sys.executable} stage.py"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run(['sh', '-c', {shell!r}])"],
        env={**os.environ, "PYTHONPATH": str(REPO), "DVC_STAGE": "headline"},
    )
    wait_for(lambda: Path("pid").is_file() and bool(Path("pid").read_text()))
    child = Path("/proc", Path("pid").read_text())
    parent.kill()
    parent.wait()
    time.sleep(0.2)
    adopter = int((child / "stat").read_text().rpartition(")")[2].split()[1])
    if between:
        adopter = int(Path(f"/proc/{adopter}/stat").read_text().rpartition(")")[2].split()[1])
    if adopter != 1:
        Path("go").touch()
        pytest.skip(f"orphans are taken in by process {adopter} here, which cannot be told from a DVC")
    Path("go").touch()
    wait_for(lambda: not child.exists() or ") Z" in (child / "stat").read_text())
    assert not Path("began").exists()


def test_a_stage_started_by_hand_goes_on(workplace: Path) -> None:
    """`nohup python -m stages ...` survives the shell it was started from."""
    stage = (
        "import os, time; from pathlib import Path; from stages.core.stage import stage_run\n"
        "with stage_run('headline', sections=(), inputs=[], outputs=[Path('data/out.jsonl')]):\n"
        "    Path('pid').write_text('started'); time.sleep(2); Path('data').mkdir(exist_ok=True)\n"
        "    Path('data/out.jsonl').write_text('{}')\n"
    )
    Path("stage.py").write_text(stage)
    environment = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"}
    command = f"import subprocess; subprocess.run(['sh', '-c', '{sys.executable} stage.py; true'])"
    parent = subprocess.Popen([sys.executable, "-c", command], env={**environment, "PYTHONPATH": str(REPO)})
    wait_for(lambda: Path("pid").is_file())
    parent.kill()
    parent.wait()
    wait_for(lambda: Path("data/out.manifest.json").is_file())


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("nothing happened in 20 s")


def test_a_full_disk_is_one_line_whoever_finds_out(workplace: Path) -> None:
    """torch and safetensors raise errors of their own; other errors are left as they are."""
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ):
        with (
            pytest.raises(UserError, match=r"headline: the disk is full .* it goes on where it was"),
            stage_run("headline", sections=(), inputs=[], outputs=[]),
        ):
            raise error
    with (
        pytest.raises(RuntimeError, match="a bug"),
        stage_run("headline", sections=(), inputs=[], outputs=[]),
    ):
        raise RuntimeError("a bug")
