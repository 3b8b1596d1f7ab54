"""scripts/host.sh on a host made of stand-ins (nvidia-smi, df, dvc, shutdown, ...), with a real tmux and a real git."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TOOLS = (
    "awk basename bash cat cksum cp cut date dirname grep head id ls mkdir mktemp mv rm sed sh sleep sort "
    "tail tee touch tr wc git tmux"
).split()
needs_tmux = pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")

H100 = "NVIDIA H100 80GB HBM3, 580.95.05, 81559, 9.0"
STAND_INS = {
    "nvidia-smi": 'cat "$HOST/gpus"',
    # Filesystem, blocks, used, available, capacity, mount; the free room is that of the first line of `free` whose
    # place is in the path asked for.
    "df": """while read -r place kb mount; do
        case "$PWD/${@: -1}" in *"$place"*) break ;; esac
    done <"$HOST/free"
    printf 'Filesystem 1024-blocks Used Available Capacity Mounted on\\n/dev/x 1 1 %s 1%% %s\\n' "$kb" "$mount" """,
    "du": """case "${@: -1}" in *models--*) kb=$DOWNLOADED ;; *) kb=0 ;; esac; echo "${kb:-0} ${@: -1}" """,
    "free": "echo '        total'; echo \"Mem:    ${MEMORY_MIB:-200000}\"",
    "make": """echo "make $*" >>"$HOST/calls"; mkdir -p .venv/bin
    cp "$HOST/venv/"* .venv/bin/; touch .venv/installed""",
    "shutdown": 'echo "shutdown $*" >>"$HOST/calls"',
    "sudo": 'shift; "$@"',  # sudo -n shutdown
}
IN_VENV = {
    "python": """case "$*" in
        -) exec {python} - ;;
        "-m stages remote check "*) echo "$*" >>"$HOST/calls"; exit "${{REMOTE_STATUS:-0}}" ;;
        "-m stages check") [ -z "$BAD_PARAMS" ] || {{ echo "NO: a parameter"; exit 1; }}; echo prompts ;;
        *) exec {python} "$@" ;;
    esac""",
    # A run lasts until the file `go` is there.
    "dvc": """echo "dvc $*" >>"$HOST/calls"
    case "$1" in
        remote) cat "$HOST/remotes" ;;
        push) exit "${PUSH_STATUS:-0}" ;;
        repro)
            echo "Running stage 'sft':"
            trap 'echo "ended in order"; exit 130' INT
            until [ -e "$HOST/go" ]; do sleep 0.05; done
            exit "${REPRO_STATUS:-0}" ;;
    esac""",
}


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

    def gpu(self, line: str) -> None:
        (self.here / "gpus").write_text(line + "\n" if line else "")

    def profile(self, name: str) -> None:
        file = self.root / "params.yaml"
        file.write_text(re.sub(r"^profile: .*", f"profile: {name}", file.read_text(), flags=re.MULTILINE))

    def disk(self, *lines: str) -> None:
        """`place-in-the-path free-GB mount`, the first that fits counts."""
        rows = [line.split() for line in lines]
        text = [f"{place} {int(float(gb) * 1e9 / 1024)} {mount}" for place, gb, mount in rows]
        (self.here / "free").write_text("\n".join(text) + "\n")

    def calls(self) -> list[str]:
        file = self.here / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def go(self) -> None:
        """Let the stand-in of `dvc repro` end."""
        (self.here / "go").touch()

    def ended(self) -> None:
        """Wait until the run is over and its tmux session gone."""
        wait(lambda: "\nrunning" not in "\n" + self.show())

    def show(self, **env: str) -> str:
        """`status`, whatever its exit status."""
        done = subprocess.run(
            ["scripts/host.sh", "status"],
            cwd=self.root,
            env=self.environment | env,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout


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
    """A fresh clone with profile abel-7b on a good machine: one H100, 400 GB free, Python as here."""
    root, here = tmp_path / "looper", tmp_path / "host"
    for folder in (here / "bin", here / "venv", here / "home"):
        folder.mkdir(parents=True)
    for name in ("scripts", "profiles", ".dvc"):
        shutil.copytree(REPO / name, root / name, ignore=shutil.ignore_patterns("cache", "tmp", "*.local"))
    for name in ("params.yaml", "requirements.txt", ".gitignore"):
        shutil.copy2(REPO / name, root / name)
    for name in TOOLS:
        if found := shutil.which(name):
            (here / "bin" / name).symlink_to(found)
    (here / "bin" / "python3").symlink_to(sys.executable)
    for name, body in STAND_INS.items():
        script(here / "bin" / name, body)
    for name, body in IN_VENV.items():
        script(here / "venv" / name, body.format(python=sys.executable) if name == "python" else body)
    sockets = tempfile.mkdtemp(prefix="lt", dir="/tmp")  # tmux's socket needs a short path
    environment = {
        "PATH": str(here / "bin"), "HOME": str(here / "home"), "HOST": str(here), "TMUX_TMPDIR": sockets,
        "TERM": "dumb", "LC_ALL": "C.UTF-8",
    }  # fmt: skip
    host = Host(root, here, environment)
    (here / "remotes").write_text("private\tssh://someone:very-secret@storage/looper\n")
    host.gpu(H100)
    host.disk("/ 400 /")
    host.profile("abel-7b")
    commit = "git init -q && git add -A && git -c user.name=t -c user.email=t@localhost commit -qm clone"
    subprocess.run(["bash", "-c", commit], cwd=root, check=True)
    yield host
    host.go()
    for socket in Path(sockets).rglob("looper-*"):
        subprocess.run(["tmux", "-S", str(socket), "kill-server"], check=False, capture_output=True)
    shutil.rmtree(sockets)


@pytest.fixture
def ready(host: Host) -> Host:
    """A host on which `setup` is done, without a GPU so that the real torch has nothing to find."""
    host.profile("tiny")
    host.gpu("")
    host.run("setup")
    return host


# ---- check ---------------------------------------------------------------------------------------------


@needs_tmux
def test_a_good_host_passes_and_nothing_is_changed(host: Host) -> None:
    before = sorted(host.root.rglob("*"))
    said = host.run("check")
    assert "ok    1 x NVIDIA H100 80GB HBM3, 79 GiB; driver 580.95.05 runs CUDA 13.0" in said
    assert re.search(r"ok    disk /: 400 GB free, \d\d GB needed", said)
    assert "NO" not in said
    assert sorted(host.root.rglob("*")) == before and host.calls() == []


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ("NVIDIA A100-SXM4-40GB, 570.172.08, 40960, 8.0", "NO    NVIDIA driver 570.172.08 is too old for CUDA 13.0"),
        ("NVIDIA A10, 99.10, 24564, 8.6", "NO    NVIDIA driver 99.10 is too old"),
        ("Tesla V100-SXM2-16GB, 580.95.05, 16384, 7.0", "has compute capability 7.0; CUDA 13.0 needs 7.5"),
        ("", "NO    no NVIDIA driver"),
    ],
)  # fmt: skip
def test_a_gpu_or_driver_that_cannot_run_the_pinned_torch_is_refused(host: Host, gpu: str, said: str) -> None:
    host.gpu(gpu)
    assert said in host.run("check", status=1)


@needs_tmux
@pytest.mark.parametrize("driver", ["580.65.06", "590.44.01", "1000.1"])
def test_newer_drivers_are_taken(host: Host, driver: str) -> None:
    host.gpu(f"NVIDIA A100, {driver}, 81920, 8.0\nNVIDIA A100, {driver}, 81920, 8.0")
    assert f"ok    2 x NVIDIA A100, 80 GiB; driver {driver}" in host.run("check")


def test_a_driver_updated_under_the_kernel_is_told(host: Host) -> None:
    message = "Failed to initialize NVML: Driver/library version mismatch"
    script(host.here / "bin" / "nvidia-smi", f"echo '{message}'; exit 18")
    assert "sudo reboot" in host.run("check", status=1)


def test_the_tiny_profile_needs_no_gpu(host: Host) -> None:
    host.profile("tiny")
    host.gpu("")
    assert "no NVIDIA GPU; the profile tiny needs none" in host.run("check")


def test_a_torch_of_unknown_cuda_is_not_guessed_at(host: Host) -> None:
    """Whoever pins another torch must look up its CUDA and that CUDA's driver."""
    file = host.root / "requirements.txt"
    file.write_text(re.sub(r"^torch==\S+", "torch==9.9.0", file.read_text(), flags=re.MULTILINE))
    assert "does not know which CUDA torch 9.9.0 is built for" in host.run("check", status=1)


@needs_tmux
def test_disk_counts_download_weights_and_their_copy(host: Host) -> None:
    host.disk("/ 60 /")
    said = host.run("check", status=1)
    needed = int(re.findall(r"NO    disk /: 60 GB free, (\d+) GB needed", said)[0])
    assert 29 + 2 * 14.5 < needed < 29 + 2 * 14.5 + 25
    host.disk(f"/ {needed + 1} /")
    host.run("check")
    # A cache of hard links saves the copy; what has come down already needs no room again.
    (host.root / ".dvc" / "config.local").write_text(
        '[cache]\n    type = "hardlink,copy"\n[\'remote "x"\']\n'
    )
    host.disk(f"/ {needed - 14} /")
    assert "copy in DVC's cache" not in host.run("check")
    host.disk(f"/ {needed - 42} /")
    host.run("check", status=1)
    (host.here / "home/.cache/huggingface/hub/models--GAIR--Abel-7B-002").mkdir(parents=True)
    host.run("check", DOWNLOADED=str(29 * 10**6))


def test_every_filesystem_is_counted_by_itself(host: Host) -> None:
    host.disk("elsewhere 20 /small", "/ 400 /")
    (host.here / "elsewhere").mkdir()
    said = host.run("check", status=1, HF_HOME=str(host.here / "elsewhere"))
    assert "NO    disk /small: 20 GB free, 29 GB needed" in said
    assert "ok    disk /: 400 GB free" in said


def test_memory_grows_with_the_gpus(host: Host) -> None:
    host.gpu("\n".join([H100] * 8))
    assert "NO    memory: 63 GB, 119 GB needed" in host.run("check", status=1, MEMORY_MIB="60000")


def test_an_old_python_is_refused_with_what_to_type(host: Host) -> None:
    (host.here / "bin" / "python3").unlink()
    script(host.here / "bin" / "python3", "echo 3.10")
    said = host.run("check", status=1)
    assert "Python 3.11 or newer is needed, 3.10 is here" in said and "python3.12-venv" in said
    script(host.here / "bin" / "python3.12", 'case "$2" in *ensurepip*) exit 1 ;; *) echo 3.12 ;; esac')
    assert "sudo apt-get install -y python3.12-venv" in host.run("check", status=1)
    script(host.here / "bin" / "python3.12", "echo 3.12")
    assert "ok    Python 3.12 (python3.12)" in host.run("check")


def test_a_missing_tool_and_an_unknown_profile_are_told(host: Host) -> None:
    (host.here / "bin" / "tmux").unlink(missing_ok=True)
    assert "sudo apt-get install -y tmux" in host.run("check", status=1)
    host.profile("none-such")
    assert "no file profiles/none-such.yaml" in host.run("check", status=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fly"], "no command 'fly'"),
        (["check", "--push", "x"], "check takes no '--push'"),
        (["start", "--push"], "--push: name the remote"),
        (["start", "--poweroff"], "--poweroff goes with --push REMOTE"),
        (["push"], "which remote?"),
        (["start"], "there is no .venv yet"),
        (["attach"], "nothing runs"),
    ],
)
def test_wrong_use_is_one_line(host: Host, arguments: list[str], said: str) -> None:
    lines = host.run(*arguments, status=1).splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


# ---- setup ---------------------------------------------------------------------------------------------


@needs_tmux
def test_setup_installs_what_is_asked_for_and_can_be_repeated(host: Host) -> None:
    host.profile("tiny")
    host.run("setup")
    said = host.run("setup", "--vllm")
    assert "ok    python -m stages check" in said
    made = [call.split() for call in host.calls()]
    assert [call[-1] for call in made] == [*2 * [".venv/installed-remote"], ".venv/installed-gpu"]
    assert (host.root / ".work/host/check").read_text() == "prompts\n"
    assert host.run("setup", status=1, BAD_PARAMS="1").splitlines()[-2:] == [
        "NO: a parameter",
        "error: python -m stages check found something wrong, see above",
    ]


@needs_tmux
def test_setup_stops_where_the_check_fails(host: Host) -> None:
    host.disk("/ 10 /")
    host.run("setup", status=1)
    assert host.calls() == []
    script(host.here / "venv" / "python", "cat >/dev/null; exit 1")  # torch sees no GPU
    said = host.run("setup", "--anyway", status=1)
    assert host.calls() and "error: torch sees no GPU" in said


# ---- the run -------------------------------------------------------------------------------------------


@needs_tmux
def test_a_run_outlives_the_connection_it_was_started_from(ready: Host) -> None:
    pid, terminal = pty.fork()
    if not pid:  # a login session with a terminal, as sshd makes one
        os.chdir(ready.root)
        os.execve("scripts/host.sh", ["scripts/host.sh", "start", "--", "dpo"], ready.environment)
    wait(lambda: "dvc repro dpo" in ready.calls())
    os.close(terminal)  # the connection drops: everything on that terminal is hung up
    os.waitpid(pid, 0)
    said = ready.run("status")
    assert "running since" in said and "Running stage 'sft':" in said
    assert "it runs already" in ready.run("start")
    ready.go()
    ready.ended()
    assert ready.run("status").startswith("finished well at")
    assert ready.calls().count("dvc repro dpo") == 1


@needs_tmux
def test_stop_ends_it_in_order_and_start_goes_on(ready: Host) -> None:
    ready.run("start")
    wait(lambda: "Running stage" in ready.show())
    assert "stopped; scripts/host.sh start goes on" in ready.run("stop")
    assert "ended in order" in (ready.root / ".work/host/log").read_text()
    assert ready.run("status", status=1).startswith("stopped at")
    assert not [call for call in ready.calls() if call.startswith("shutdown")]
    ready.go()
    ready.run("start")
    ready.ended()
    assert "finished well" in ready.run("status")
    assert "nothing runs" in ready.run("stop")


@needs_tmux
def test_a_failure_and_a_reboot_are_told(ready: Host) -> None:
    assert "nothing was started here" in ready.run("status", status=1)
    ready.go()
    ready.run("start", REPRO_STATUS="7")
    ready.ended()
    assert "ended with status 7" in ready.run("status", status=1)
    (ready.here / "go").unlink()
    ready.run("start")
    wait(lambda: "Running stage" in ready.show())
    for socket in Path(ready.environment["TMUX_TMPDIR"]).rglob("looper-*"):
        subprocess.run(["tmux", "-S", str(socket), "kill-server"], check=True)
    ready.ended()
    assert "cut off (a reboot?)" in ready.run("status", status=1)


@needs_tmux
@pytest.mark.parametrize(
    ("env", "off"), [({}, True), ({"REPRO_STATUS": "1"}, False), ({"PUSH_STATUS": "1"}, False)]
)
def test_the_machine_is_halted_only_when_asked_and_all_is_pushed(
    ready: Host, env: dict[str, str], off: bool
) -> None:
    ready.go()
    ready.run("start", "--push", "private", "--poweroff", **env)
    ready.ended()
    calls = ready.calls()
    assert ("shutdown -h +1" in calls) == off
    assert ("dvc push -r private" in calls) == (env.get("REPRO_STATUS") is None)
    assert "very-secret" not in (ready.root / ".work/host/log").read_text()


@needs_tmux
def test_push_goes_to_a_named_remote_and_says_what_git_lacks(ready: Host) -> None:
    said = ready.run("push", "elsewhere", status=1)
    assert "error: no remote 'elsewhere'" in said and "very-secret" not in said
    ready.run("start", "--push", "elsewhere", status=1)
    assert not [call for call in ready.calls() if call.startswith(("dvc push", "dvc repro"))]
    ready.run("push", "private", status=1, REMOTE_STATUS="1")
    assert "dvc push -r private" not in ready.calls()
    said = ready.run("push", "private")
    check = "-m stages remote check private"
    assert ready.calls()[-3:] == [f"{check} --no-objects", "dvc push -r private", check]
    assert "very-secret" not in said
    assert "git has uncommitted changes" in said  # params.yaml
    assert "shutdown -h +1" not in ready.calls()
    ready.run("stop", "--poweroff")
    assert ready.calls()[-1] == "shutdown -h +1"
