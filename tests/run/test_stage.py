"""The frame of every stage: one run at a time, progress that is kept and never mixed up, manifests, clear errors."""

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

import psutil
import pytest

from stages.run import code, stage
from stages.run.errors import UserError
from stages.run.files import atomic_folder, sha256_file
from stages.run.stage import StageRun, last_runs, manifest_path, stage_run

REPO = Path(__file__).resolve().parents[2]
OUT, SIDE = Path("data/out.jsonl"), Path("metrics/out.json")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the project's parameters and one input."""
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
    """Run a stage that writes two outputs."""
    with stage_run("headline", sections=sections, inputs=[Path("input.jsonl")], outputs=[OUT, SIDE]) as run:
        for path in (OUT, SIDE):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return run


def cut_off() -> None:
    """Stop a run after it wrote progress."""
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


def test_facts_about_a_run_are_noted() -> None:
    """`plan` and `runs` show them; the versions are for whoever asks later what made a result."""
    run = work()
    (facts,) = last_runs()
    assert facts["stage"] == run.name and facts["seconds"] >= 0 and facts["peak_memory_mib"] > 0
    assert "CPUs" in facts["machine"] and {"torch", "trl", "dvc"} <= set(facts["versions"])


def test_manifest_of_a_folder_lies_inside() -> None:
    folder = Path("checkpoints/some")
    with (
        stage_run("headline", sections=(), inputs=[Path("input.jsonl")], outputs=[folder]),
        atomic_folder(folder) as fresh,
    ):
        (fresh / "weights").write_text("w")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["outputs"] == {"checkpoints/some/weights": sha256_file(folder / "weights")}
    with stage_run("headline", sections=(), inputs=[folder], outputs=[OUT]):  # its hash stands for the folder
        OUT.parent.mkdir()
        OUT.write_text("")
    assert json.loads(manifest_path(OUT).read_text())["inputs"] == {
        folder.as_posix(): sha256_file(folder / "manifest.json")
    }


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
    work()  # the lock is free again


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


@pytest.mark.parametrize(("file", "kept"), [("stages/run/files.py", True), ("stages/headline.py", False)])
def test_progress_is_of_the_code_that_dvc_yaml_lists(
    file: str, kept: bool, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on after a change for which DVC would not run the stage again, and only then."""
    shutil.copytree(REPO / "stages", "stages")
    shutil.copy(REPO / "dvc.yaml", ".")
    for module in (code, stage):
        monkeypatch.setattr(module, "ROOT", workplace)
    folder = interrupted()
    with Path(file).open("a", encoding="utf-8") as changed:
        changed.write("# A comment.\n")
    assert (interrupted() == folder) == kept


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


def test_what_a_kill_left_beside_the_outputs_is_removed() -> None:
    """DVC would hash half-written outputs of a killed run. The files of other stages stay."""
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


def test_half_deleted_progress_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill while progress was being deleted, what is left must not look like progress."""
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


def test_sigterm_ends_a_stage_in_order() -> None:
    """It is an ordinary exit, so that journals are closed."""

    def terminated() -> None:
        with stage_run("headline", sections=("headline",), inputs=[], outputs=[OUT]):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(SystemExit) as ended:
        terminated()
    assert ended.value.code == 143


BEGIN = "with stage_run('headline', sections=(), inputs=[], outputs=[Path('data/out.jsonl')]):\n"
BETWEEN = pytest.mark.parametrize("between", [False, True], ids=["direct", "a shell in between"])
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")


def start_under_a_parent(
    program: str, between: bool, **environment: str
) -> tuple[subprocess.Popen[bytes], int]:
    """Run a program as a child of another process, with or without a shell in between; returns parent and child."""
    imports = "import os, time; from pathlib import Path; from stages.run.stage import last_runs, stage_run\n"
    note = "Path('.pid').write_text(str(os.getpid())); Path('.pid').rename('pid')\n"
    Path("program.py").write_text(imports + program.replace("NOTE\n", note))
    shell = f"{sys.executable} program.py; true" if between else f"exec {sys.executable} program.py"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run(['sh', '-c', {shell!r}])"],
        env={name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
        | {"PYTHONPATH": str(REPO), **environment},
    )
    wait_for(Path("pid").is_file)
    return parent, int(Path("pid").read_text())


def has_ended(pid: int) -> bool:
    """Whether a process has ended, also when nobody has waited for it yet (a zombie, Z)."""
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or ") Z" in state.read_text()


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("nothing happened in 20 s")


@LINUX
@BETWEEN
def test_a_stage_ends_when_its_parent_is_killed(between: bool) -> None:
    """When dvc is killed, the stage must not go on writing, even if the shell that dvc uses stays its parent."""
    parent, child = start_under_a_parent(
        BEGIN + "    NOTE\n    time.sleep(60)\n", between, DVC_STAGE="headline"
    )
    parent.kill()
    parent.wait()
    wait_for(lambda: has_ended(child))


@LINUX
@BETWEEN
def test_a_stage_ends_when_its_parent_was_killed_while_it_started(between: bool) -> None:
    """The imports of a stage take seconds. DVC may be gone before the stage can ask who its parent is."""
    program = (
        "NOTE\nwhile not Path('go').exists(): time.sleep(0.01)\n" + BEGIN + "    Path('began').touch()\n"
    )
    parent, child = start_under_a_parent(program, between, DVC_STAGE="headline")
    parent.kill()
    parent.wait()
    time.sleep(0.2)
    adopter = psutil.Process(child).ppid()
    if between:
        adopter = psutil.Process(adopter).ppid()
    Path("go").touch()
    if adopter != 1:
        pytest.skip(f"process {adopter} adopts orphans here, and it cannot be told from a DVC")
    wait_for(lambda: has_ended(child))
    assert not Path("began").exists()


def test_a_stage_started_by_hand_goes_on() -> None:
    """`nohup python -m stages ...` survives the shell it was started from."""
    work = "    NOTE\n    time.sleep(2); Path('data').mkdir(); Path('data/out.jsonl').write_text('{}')\n"
    parent, _ = start_under_a_parent(BEGIN + work, between=True)
    parent.kill()
    parent.wait()
    wait_for(lambda: Path("data/out.manifest.json").is_file())


def test_a_full_disk_is_one_line_whichever_library_finds_out() -> None:
    """torch and safetensors raise errors of their own. Other errors stay as they are."""
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
