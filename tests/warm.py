"""A Python that has already imported the heavy libraries, and forks a copy of itself for each command of a test.

Starting `python -m stages sft` costs seconds of imports; a fork costs hundredths. The commands of a test project find
small programs first in PATH: `python`, `python3` and `dvc`, so what `dvc repro` starts finds them, too. They hand
arguments, folder, environment and open files to the warm parent, whose fork becomes the command, and wait for its end:

    program `python` -- socket --> warm parent -- fork --> keeper -- fork --> the command

The keeper tells the program how the command ended, and kills the command when the program is killed. The warm parent
keeps nothing of this project: every command imports the `stages` of its own folder. A network guard in the warm
parent's PYTHONPATH guards all of them.

A fork shares with its parent what was read from the environment during imports, and the seed of hashes. Tests of
these, of kills and of signals start a Python of their own (`Project.cold`).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What stages and DVC import while they work.
LATE = """dvc.cli dvc.commands.repro dvc.commands.status dvc.repo.reproduce dvc.stage.cache dvc.fs jinja2 rich.progress
 safetensors.torch scipy.special transformers.models.mistral.modeling_mistral""".split()

# Without `site` and the environment's settings it starts in a few hundredths of a second.
PROGRAM = """#!/bin/sh
exec '{python}' -ISc '
import json, os, socket, sys
folder, name, *words = sys.argv[1:]
words = ["-m", "dvc", *words] if name == "dvc" else words
if words[:1] not in (["-m"], ["-c"]):
    os.execv("{python}", ["{python}", *words])
request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
line = socket.socket(socket.AF_UNIX)
os.chdir(folder)  # the name of a socket must be short
line.connect("socket")
socket.send_fds(line, [len(request).to_bytes(8, "big")], [0, 1, 2])
line.sendall(request)
sys.exit(int(line.recv(8) or b"1"))
' "$(dirname "$0")" "$(basename "$0")" "$@"
"""


@contextlib.contextmanager
def warm_python(folder: Path, environment: dict[str, str], before: list[str]) -> Iterator[Path]:
    """Start the warm parent, by the command `before`, and yield the folder of its programs while it imports."""
    for name in ("python", "python3", "dvc"):
        (folder / name).write_text(PROGRAM.format(python=sys.executable), encoding="utf-8")
        (folder / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(folder):
        listener.bind("socket")
        listener.listen(64)
        command = [*before, sys.executable, __file__, str(listener.fileno())]
        parent = subprocess.Popen(
            command, stdin=subprocess.PIPE, env=environment, pass_fds=[listener.fileno()]
        )
    try:
        yield folder
    finally:
        parent.communicate()  # closes its standard input, at which it ends


def import_all() -> None:
    """Import the libraries by importing all that this project has, and forget the project."""
    sys.path[0] = str(ROOT)
    from stages.run.process import prepare_process

    prepare_process()
    names = [one.name for one in pkgutil.walk_packages([str(ROOT / "stages")], "stages.")]
    for name in [*names, *LATE]:
        with contextlib.suppress(ImportError):  # of Ray or vLLM, which may not be installed
            importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "stages"]:
        del sys.modules[name]


def serve(listener: socket.socket) -> list[str]:
    """Fork for each request until the tests end. Returns in each fork: the words that came after `python`."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        if 0 in select.select([listener, 0], [], [])[0]:
            os._exit(0)
        line, _ = listener.accept()
        if not os.fork():
            return receive(line)
        line.close()


def receive(line: socket.socket) -> list[str]:
    """Read a request and fork once more. The fork takes what the request brings; this process waits for its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(line, 8, 3)
    with line.makefile("rb") as reader:
        words, folder, environment = json.loads(reader.read(int.from_bytes(size, "big")))
    if child := os.fork():
        ended = os.pidfd_open(child)
        if ended not in select.select([ended, line], [], [])[0]:
            os.kill(child, signal.SIGKILL)  # the program is gone
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(OSError):
            line.send(str(status if status >= 0 else 128 - status).encode())
        os._exit(0)
    line.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return words


def run(words: list[str]) -> int:
    """What `python` does with these words: -m module or -c code, and arguments. Returns the exit status."""
    kind, what, *arguments = words
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [str(Path.cwd()) if kind == "-m" else "", *filter(None, paths)]
    sys.argv = [kind, *arguments]
    importlib.invalidate_caches()
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if not isinstance(end.code, str):
            return int(end.code or 0)
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    listening = socket.socket(fileno=int(sys.argv[1]))
    guard = os.environ.pop("PYTHONPATH", "").split(os.pathsep)
    sys.path = [place for place in sys.path if place not in guard]
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # the only thread that imports start
    import_all()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread was started, which a fork would lack"
    gc.collect()
    gc.freeze()  # no fork looks through these objects, which would copy their memory
    exit_status = run(serve(listening))
    # As Python ends, except that it takes no module down, which would copy the rest of the memory.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)
