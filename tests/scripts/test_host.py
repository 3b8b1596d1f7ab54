"""scripts/host.sh on a machine of stand-ins (nvidia-smi, df, python, make, dvc) with a real tmux; the SkyPilot task."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
TOOLS = "awk bash cat cksum cut date dirname grep head mkdir sed sleep sort tail tee touch tmux wc cp".split()
needs_tmux = pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")

PYTHON = """case "$2" in
    *version_info*) echo "${PYTHON_VERSION:-3.12}" ;;
    *sysconfig.get_path*print* | *print*sysconfig.get_path*) echo /include ;;
    *ensurepip*) case "$2" in *Python.h*) [ -z "$NO_HEADERS" ] ;; esac ;;
    stages) [ -z "$BAD_PARAMS" ] || { echo "error: a parameter"; exit 1; } ;;
esac"""
STAND_INS = {
    "nvidia-smi": 'cat "$HOST/drivers"',
    "df": 'echo header; echo "/dev/x 1 1 $((${FREE_GB:-400} * 1000000000 / 1024 + 1)) 1% /"',
    "python3": PYTHON,
    "git": "",
    "gcc": """cat >"$HOST/compiled"; echo "$*" >"$HOST/cc"
        [ -z "$NO_LIBC" ] || { echo "x.h:1: fatal error: y.h"; exit 1; }""",
    "make": """echo "$*" >>"$HOST/made"; mkdir -p .venv/bin
        cp "$HOST/bin/python3" .venv/bin/python; cp "$HOST/dvc" .venv/bin/dvc; touch "${@:3}" """,
}
# A run lasts until the file `go` is there.
DVC = """echo "dvc $*" >>"$HOST/runs"; echo "Running stage"
    trap 'echo "ended in order"; exit 130' INT
    until [ -e "$HOST/go" ]; do sleep 0.05; done
    exit "${REPRO_STATUS:-0}" """


@dataclass(frozen=True)
class Host:
    """A clone of the project on a machine of stand-ins."""

    root: Path
    here: Path  # what the stand-ins read and write
    environment: dict[str, str]

    def run(self, *arguments: str, status: int = 0, **env: str) -> str:
        """What `scripts/host.sh ARGUMENTS` prints; it must end with `status`."""
        done = subprocess.run(
            ["scripts/host.sh", *arguments],
            cwd=self.root,
            env=self.environment | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def written(self, name: str) -> list[str]:
        """The lines that the stand-ins wrote to a file."""
        file = self.here / name
        return file.read_text().splitlines() if file.exists() else []

    def in_terminal(self, *arguments: str) -> tuple[int, int]:
        """Process and terminal of a login session, as sshd makes one, in which `scripts/host.sh ARGUMENTS` runs."""
        pid, terminal = pty.fork()
        if not pid:
            os.chdir(self.root)
            os.execve("scripts/host.sh", ["scripts/host.sh", *arguments], self.environment)
        return pid, terminal

    def kill_tmux(self) -> None:
        for socket in Path(self.environment["TMUX_TMPDIR"]).rglob("looper-*"):
            subprocess.run(["tmux", "-S", str(socket), "kill-server"], check=False, capture_output=True)


def wait(done: Callable[[], object]) -> None:
    """Wait for something that must come, for a minute at most."""
    for _ in range(1200):
        if done():
            return
        time.sleep(0.05)
    pytest.fail("it did not come")


def script(path: Path, body: str) -> None:
    path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A fresh clone on a good machine: a GPU with a new driver, 400 GB free, Python 3.12."""
    root, here = tmp_path / "looper", tmp_path / "host"
    (here / "bin").mkdir(parents=True)
    shutil.copytree(REPO / "scripts", root / "scripts")
    for name in TOOLS:
        if found := shutil.which(name):
            (here / "bin" / name).symlink_to(found)
    for name, body in STAND_INS.items():
        script(here / "bin" / name, body)
    script(here / "dvc", DVC)
    (here / "drivers").write_text("580.95.05\n")
    sockets = tempfile.mkdtemp(prefix="lt", dir="/tmp")  # tmux's socket needs a short path
    environment = {
        "PATH": str(here / "bin"), "HOST": str(here), "TMUX_TMPDIR": sockets, "TERM": "xterm", "LC_ALL": "C.UTF-8",
    }  # fmt: skip
    host = Host(root, here, environment)
    yield host
    (here / "go").touch()
    host.kill_tmux()
    shutil.rmtree(sockets)


@pytest.fixture
def ready(host: Host) -> Host:
    """A host on which `setup` is done."""
    host.run("setup")
    return host


# ---- check and setup -----------------------------------------------------------------------------------


@needs_tmux
def test_a_good_host_passes_and_nothing_is_changed(host: Host) -> None:
    before = sorted(host.root.rglob("*"))
    assert host.run("check").splitlines() == [
        "ok    NVIDIA driver 580.95.05, 1 GPU(s)",
        "ok    Python 3.12 (python3)",
        "ok    git make tmux",
        "ok    C compiler (gcc)",
        "ok    disk: 15 GB needed to install, 400 GB free",
    ]
    assert sorted(host.root.rglob("*")) == before


@needs_tmux
@pytest.mark.parametrize(
    ("driver", "old"), [("580.65.06", 0), ("1000.1", 0), ("570.172.08", 1), ("99.10", 1)]
)
def test_an_old_driver_is_refused(host: Host, driver: str, old: int) -> None:
    (host.here / "drivers").write_text(f"{driver}\n{driver}\n")
    said = f"NO    NVIDIA driver {driver} is too old" if old else f"ok    NVIDIA driver {driver}, 2 GPU(s)"
    assert said in host.run("check", status=old)


def test_a_driver_that_does_not_answer_is_refused_and_none_is_not(host: Host) -> None:
    script(host.here / "bin" / "nvidia-smi", "echo 'Driver/library version mismatch'; echo more; exit 18")
    assert "NO    nvidia-smi fails: Driver/library version mismatch. Reboot" in host.run("check", status=1)
    (host.here / "bin" / "nvidia-smi").unlink()
    (host.here / "bin" / "gcc").unlink()
    said = host.run("check", NO_HEADERS="1", FREE_GB="9")
    assert "ok    no NVIDIA driver" in said and "9 GB needed to install, 9 GB free" in said


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"PYTHON_VERSION": "3.10"}, "NO    Python 3.11 or newer with venv, on a GPU also Python.h, is needed (found:"),
        ({"NO_HEADERS": "1"}, "Python.h, is needed (found: 3.12)"),
        ({"PYTHON": "python9"}, "(found: none)"),
        ({"NO_LIBC": "1"}, "NO    gcc cannot compile for Triton (x.h:1: fatal error: y.h): sudo apt-get"),
        ({"CC": "/bin/none"}, "NO    none cannot compile for Triton ("),
        ({"FREE_GB": "14"}, "NO    disk: 15 GB needed to install, 14 GB free"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_and_nothing_is_installed(
    host: Host, env: dict[str, str], said: str
) -> None:
    assert said in host.run("setup", status=1, **env)
    assert not host.written("made")


def test_missing_tools_are_named(host: Host) -> None:
    (host.here / "bin" / "tmux").unlink(missing_ok=True)
    (host.here / "bin" / "gcc").unlink()
    said = host.run("check", status=1)
    assert "\nNO    missing: sudo apt-get install -y tmux\n" in said
    assert (
        "\nNO    no C compiler, with which Triton builds for the GPU: sudo apt-get install -y gcc libc6"
        in said
    )
    assert said.endswith("\nerror: 2 to put right first\n")


@needs_tmux
def test_the_compiler_is_tried_with_pythons_headers(host: Host) -> None:
    host.run("check")
    assert host.written("compiled") == ["#include <Python.h>"]
    assert host.written("cc") == ["-x c -fsyntax-only -I/include -"]
    script(host.here / "bin" / "clang", "cat >/dev/null")
    (host.here / "bin" / "gcc").unlink()
    assert "ok    C compiler (clang)" in host.run("check")


@needs_tmux
def test_vllm_may_be_left_out(host: Host) -> None:
    said = host.run("setup", "--no-vllm", FREE_GB="9")
    assert "ok    disk: 9 GB needed to install, 9 GB free" in said
    assert host.written("made") == [
        "--no-print-directory PYTHON=python3 .venv/installed .venv/installed-remote"
    ]
    assert "NO    disk: 6 GB needed" in host.run("check", status=1, FREE_GB="5")
    assert host.run("setup", "--vllm", status=1).endswith("error: no option '--vllm': scripts/host.sh help\n")


def test_the_driver_is_that_of_the_pinned_torch() -> None:
    """Whoever pins another torch looks up its CUDA, and the oldest driver of that."""
    known = re.search(r"^TORCH=(\S+)", (REPO / "scripts/host.sh").read_text(), re.MULTILINE)
    assert known and f"\ntorch=={known[1]} " in (REPO / "requirements.txt").read_text()


@needs_tmux
def test_setup_installs_and_can_be_repeated(host: Host) -> None:
    host.run("setup")
    said = host.run("setup", FREE_GB="0")
    assert "ok    disk: 0 GB needed" in said
    first, second = host.written("made")[:2], host.written("made")[2:]
    assert first == [
        "--no-print-directory PYTHON=python3 .venv/installed .venv/installed-remote",
        "--no-print-directory PYTHON=python3 .venv/installed-gpu",
    ]
    assert len(second) == 2
    assert host.run("setup", status=1, BAD_PARAMS="1").splitlines()[-1] == "error: a parameter"


# ---- the run -------------------------------------------------------------------------------------------


@needs_tmux
def test_a_run_outlives_the_connection_it_was_started_from(ready: Host) -> None:
    pid, terminal = ready.in_terminal("start", "dpo")
    wait(lambda: ready.written("runs"))
    os.close(terminal)  # the connection drops: everything on that terminal is hung up
    os.waitpid(pid, 0)
    assert ready.run("status").startswith("running\n")
    assert "it runs already" in ready.run("start", status=1)
    pid, terminal = ready.in_terminal("attach")
    shown = b""
    while b"Running stage" not in shown:
        shown += os.read(terminal, 4096)  # at the end an OSError
    (ready.here / "go").touch()
    os.waitpid(pid, 0)
    assert ready.run("status").startswith("finished well\n")
    assert ready.written("runs") == ["dvc repro dpo"]


@needs_tmux
def test_stop_ends_it_in_order_and_start_goes_on(ready: Host) -> None:
    ready.run("start")
    wait(lambda: ready.written("runs"))
    assert "stopped; scripts/host.sh start goes on" in ready.run("stop")
    said = ready.run("status", status=1)
    assert said.startswith("ended early; scripts/host.sh start goes on")
    assert "ended in order" in said and "ended with status 130" in said
    (ready.here / "go").touch()
    ready.run("start")
    wait(lambda: "finished well" in ready.run("status"))


@needs_tmux
def test_a_failure_and_a_reboot_are_told(ready: Host) -> None:
    (ready.here / "go").touch()
    ready.run("start", REPRO_STATUS="7")
    log = ready.root / ".work/host/log"
    wait(lambda: "ended with status 7" in log.read_text())
    (ready.here / "go").unlink()
    ready.run("start")
    wait(lambda: len(ready.written("runs")) == 2)
    ready.kill_tmux()
    assert ready.run("status", status=1).startswith("ended early")


@needs_tmux
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("fly", "error: no command 'fly'"),
        ("start", "error: there is no .venv yet"),
        ("status", "error: nothing was started here"),
        ("attach", "error: nothing runs"),
        ("stop", "error: nothing runs"),
    ],
)
def test_wrong_use_is_told(host: Host, command: str, said: str) -> None:
    assert host.run(command, status=1).splitlines()[-1].startswith(said)


# ---- SkyPilot ------------------------------------------------------------------------------------------


def test_the_skypilot_task_runs_commands_that_exist(host: Host) -> None:
    task = yaml.safe_load((REPO / "scripts/skypilot.yaml").read_text())
    assert set(task) == {"name", "workdir", "resources", "setup", "run"}
    commands = task["setup"] + task["run"]
    called = re.findall(r"scripts/host\.sh (\w+)", commands)
    assert called and all(re.search(rf"^  {name} ", host.run("help"), re.MULTILINE) for name in called)
    targets = re.findall(r"^make (\w+)", commands, re.MULTILINE)
    assert targets and all(f"\n{name}:" in (REPO / "Makefile").read_text() for name in targets)
