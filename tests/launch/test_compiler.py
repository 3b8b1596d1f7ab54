"""Whether Triton can build kernels, on a host of stand-ins: a torch with a GPU, and a Triton that compiles C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.launch import compiler
from stages.launch.compiler import compiler_problem

TORCH = """
int32 = None
class zeros:
    def __init__(self, *shape, **kind):
        assert kind["device"] == "cuda"
        self.value = 0
    def item(self):
        return self.value
"""
# As triton/runtime/build.py does: it looks for a compiler, and shows what that one says.
TRITON = """
import os, shutil, subprocess
class jit:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return self.launch
    def launch(self, number):
        cc = os.environ.get("CC") or shutil.which("gcc")
        if cc is None:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable or other.")
        subprocess.check_call([cc, "x.c"])
        number.value = 1
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on which alone programs are found."""
    for name, text in {"torch.py": TORCH, "triton/__init__.py": TRITON, "triton/language.py": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


def install(host: Path, script: str) -> None:
    (host / "gcc").write_text(f"#!/bin/sh\n{script}\n")
    (host / "gcc").chmod(0o755)


def test_a_host_that_can_build_has_no_problem(host: Path) -> None:
    install(host, "exit 0")
    assert compiler_problem() == ""


def test_no_compiler(host: Path) -> None:
    said = compiler_problem()
    assert said.startswith(
        "Triton cannot build a kernel, which training on a GPU needs (RuntimeError: Failed to find C"
    )
    assert said.endswith(f"sudo apt-get install -y gcc libc6-dev python3.{sys.version_info.minor}-dev")
    assert "\n" not in said


def test_no_headers(host: Path) -> None:
    """The line of the compiler is shown, not Triton's about the command that failed."""
    install(host, 'echo "x.c:1:10: fatal error: Python.h: No such file or directory" >&2; exit 1')
    assert "(x.c:1:10: fatal error: Python.h: No such file or directory)" in compiler_problem()


def test_the_kernel_is_one_that_triton_compiles() -> None:
    """For an H100, which need not be here; where Triton is installed."""
    pytest.importorskip("triton")
    code = (
        "import runpy, sys, triton\nfrom triton.backends.compiler import GPUTarget\n"
        "kernel = runpy.run_path(sys.argv[1])['write_one']\n"
        "source = triton.compiler.ASTSource(kernel, {'place': '*i32'}, {}, {})\n"
        "assert triton.compile(source, target=GPUTarget('cuda', 90, 32)).asm['cubin']"
    )
    subprocess.run([sys.executable, "-c", code, str(compiler.KERNEL)], check=True, env=os.environ)
