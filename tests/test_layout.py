"""The layout: what is computed stands apart from how it is run, and dvc.yaml lists just the code a stage computes with.

Each guard is a function of a project's folder that returns what is wrong there. It must find nothing here, and the
fault that `BROKEN` builds into a copy.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

REPO = Path(__file__).resolve().parents[1]
STAGES = "prepare base sft rollout coherence preference dpo evaluate vote headline report".split()
COMPUTED = "text regime_w policy train stats checkpoint tiny page".split()
RUNNING = "run launch engine".split()
RESULTS = "stages/run/RESULTS"
Graph = dict[str, set[str]]  # file -> the project's files it imports, as paths relative to the project


@cache
def imports(project: Path) -> Graph:
    """The imports of every file under stages/, also those inside functions."""
    graph: Graph = {}
    for path in sorted((project / "stages").rglob("*.py")):
        name = path.relative_to(project).as_posix()
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: relative import"
                modules = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
            files = {f"{module.replace('.', '/')}.py" for module in modules}
            graph[name] |= {file for file in files if (project / file).is_file()} - {name}
    return graph


def reached(graph: Graph, start: str) -> set[str]:
    """All files that `start` imports, directly or not, itself included."""
    found, waiting = set(), [start]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += graph[file]
    return found


def room(file: str) -> str:
    """The folder of a file under stages/; `stage` for the stages themselves."""
    parts = file.split("/")
    return "stage" if len(parts) == 2 else parts[1]


@cache
def pipeline(text: str) -> dict[str, Any]:
    return YAML(typ="safe").load(text)["stages"]


def declared(project: Path, stage: str) -> dict[str, Any]:
    entry = pipeline((project / "dvc.yaml").read_text(encoding="utf-8"))[stage]
    return entry.get("do", entry)


def code(project: Path, stage: str) -> list[str]:
    return [path for path in declared(project, stage)["deps"] if path.startswith("stages/")]


def computes(graph: Graph, stage: str) -> set[str]:
    """The files above the line that a stage uses."""
    return {file for file in reached(graph, f"stages/{stage}.py") if room(file) in (*COMPUTED, "stage")}


# ---- Guards ------------------------------------------------------------------------------------------


def how_it_runs_is_no_dependency(project: Path) -> list[str]:
    return [
        f"{stage}: {path}"
        for stage in STAGES
        for path in code(project, stage)
        if path.split("/")[1] in (*RUNNING, "tools") and path != RESULTS
    ]


def what_is_computed_is_a_dependency(project: Path) -> list[str]:
    graph = imports(project)
    return [
        f"{stage}: {file}"
        for stage in STAGES
        for file in computes(graph, stage)
        if not any(file == path or file.startswith(f"{path}/") for path in code(project, stage))
    ]


def no_dependency_is_unused(project: Path) -> list[str]:
    graph = imports(project)
    return [
        f"{stage}: {path}"
        for stage in STAGES
        for path in code(project, stage)
        if path != RESULTS
        and not any(file == path or file.startswith(f"{path}/") for file in computes(graph, stage))
    ]


def results_is_a_dependency_where_a_model_runs(project: Path) -> list[str]:
    models = {stage for stage in STAGES if "import torch" in _source(project, stage)}
    return [stage for stage in STAGES if (RESULTS in code(project, stage)) != (stage in models)]


def _source(project: Path, stage: str) -> str:
    files = reached(imports(project), f"stages/{stage}.py") - {"stages/launch/devices.py"}
    return "\n".join(re.sub(r"(?m)^ +.*", "", (project / file).read_text(encoding="utf-8")) for file in files)


def no_arrow_up(project: Path) -> list[str]:
    """What is computed imports only `run`, `run` imports nothing, only tools import tools, nothing imports a stage."""
    allowed = {
        "run": {"run"},
        **{name: {*COMPUTED, "run"} for name in COMPUTED},
        "launch": {*COMPUTED, *RUNNING},
        "engine": {*COMPUTED, *RUNNING},
        "stage": {*COMPUTED, *RUNNING},
        "tools": {*COMPUTED, *RUNNING, "tools"},
    }
    found = []
    for file, used in imports(project).items():
        if file == "stages/__main__.py":
            continue
        assert room(file) in allowed, f"{file}: a room that the layout does not know"
        found += [f"{file} imports {other}" for other in used if room(other) not in allowed[room(file)]]
    return found


def no_circle(project: Path) -> list[str]:
    """Neither files nor rooms import each other in a circle."""
    graph = imports(project)
    rooms: Graph = {}
    for file, used in graph.items():
        if file != "stages/__main__.py":
            rooms.setdefault(room(file), set()).update({room(other) for other in used} - {room(file)})
    rooms.setdefault("stage", set())
    return [
        start
        for network in (graph, rooms)
        for start in network
        if any(start in reached(network, other) for other in network[start])
    ]


def stages_are_short(project: Path) -> list[str]:
    texts = {stage: (project / "stages" / f"{stage}.py").read_text(encoding="utf-8") for stage in STAGES}
    return [stage for stage, text in texts.items() if text.count("\n") > 150]


BROKEN: list[tuple[Callable[[Path], list[str]], str, str]] = [  # guard, file, what is appended to it
    (what_is_computed_is_a_dependency, "stages/headline.py", "from stages.stats.one import wilson\n"),
    (what_is_computed_is_a_dependency, "stages/engine/handout.py", "import stages.tiny.problems\n"),
    (no_arrow_up, "stages/text/answers.py", "from stages.launch.cores import map_in_order\n"),
    (no_arrow_up, "stages/train/trainer.py", "def f():\n    from stages.engine.load import load_engine\n"),
    (no_arrow_up, "stages/run/files.py", "from stages.text.answers import read_answer\n"),
    (no_arrow_up, "stages/sft.py", "from stages.dpo import main\n"),
    (no_arrow_up, "stages/tools/grade.py", "import stages.evaluate\n"),
    (no_circle, "stages/text/answers.py", "import stages.text.verdict\n"),
    (no_circle, "stages/stats/one.py", "import stages.page.svg\n"),
    (stages_are_short, "stages/sft.py", "\n" * 151),
]
BROKEN_PIPELINE = [  # guard, text in dvc.yaml, what takes its place
    (
        how_it_runs_is_no_dependency,
        "- stages/headline.py",
        "- stages/headline.py\n      - stages/run/files.py",
    ),
    (what_is_computed_is_a_dependency, "      - stages/page\n", ""),
    (no_dependency_is_unused, "- stages/headline.py", "- stages/headline.py\n      - stages/stats"),
    (
        results_is_a_dependency_where_a_model_runs,
        "      - stages/run/RESULTS\n    outs:\n      - checkpoints/base",
        "    outs:\n      - checkpoints/base",
    ),
]
GUARDS = list(dict.fromkeys(guard for guard, *_ in [*BROKEN, *BROKEN_PIPELINE]))


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)
def test_the_layout_holds(guard: Callable[[Path], list[str]]) -> None:
    assert guard(REPO) == []


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(REPO / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "dvc.yaml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("guard", "file", "fault"), BROKEN)
def test_a_guard_sees_a_fault_in_the_code(
    project: Path, guard: Callable[[Path], list[str]], file: str, fault: str
) -> None:
    with (project / file).open("a", encoding="utf-8") as code_file:
        code_file.write(fault)
    assert guard(project)


@pytest.mark.parametrize(("guard", "text", "fault"), BROKEN_PIPELINE)
def test_a_guard_sees_a_fault_in_the_pipeline(
    project: Path, guard: Callable[[Path], list[str]], text: str, fault: str
) -> None:
    before = (project / "dvc.yaml").read_text(encoding="utf-8")
    assert text in before
    (project / "dvc.yaml").write_text(before.replace(text, fault), encoding="utf-8")
    assert guard(project)


# ---- More about dvc.yaml -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_says_what_it_does(stage: str) -> None:
    entry = declared(REPO, stage)
    assert len(entry["desc"]) > 20
    assert "\n" not in entry["cmd"], "DVC runs each line in a shell of its own"
    assert entry["cmd"].startswith(f"python3 -m stages {stage}")


@pytest.mark.parametrize("stage", STAGES)
def test_the_params_of_a_stage_are_the_sections_it_reads(stage: str) -> None:
    """A value that is read and not declared would not rerun the stage. `hardware` may never be declared."""
    in_dvc: set[str] = set()
    for entry in declared(REPO, stage).get("params", []):
        in_dvc |= {entry} if isinstance(entry, str) else {key for values in entry.values() for key in values}
    source = (REPO / "stages" / f"{stage}.py").read_text(encoding="utf-8")
    (call,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "stage_run"
    ]
    assert ast.literal_eval(call.args[0]) == stage
    sections = next(word.value for word in call.keywords if word.arg == "sections")
    assert set(ast.literal_eval(sections)) == in_dvc
    assert set(re.findall(r"load_params\(\)\.(\w+)", source)) <= {key.split(".")[0] for key in in_dvc}
    assert "hardware" not in in_dvc


@pytest.mark.parametrize("stage", ["evaluate", "dpo", "sft", "base"])
def test_training_and_inference_need_nothing_of_regime_w(stage: str) -> None:
    assert not [file for file in reached(imports(REPO), f"stages/{stage}.py") if room(file) == "regime_w"]


def test_regime_w_needs_the_standard_library_and_numpy_only() -> None:
    """It is the private part: it must be easy to replace, and start at once."""

    def loaded(program: str) -> set[str]:
        program += (
            "\nimport sys; print(*{name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
        )
        command = [sys.executable, "-c", program]
        return set(
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO).stdout.split()
        )

    files = sorted(path.stem for path in (REPO / "stages/regime_w").glob("[a-z]*.py"))
    program = "\n".join(f"import stages.regime_w.{name}" for name in files)
    assert loaded(program) - loaded("import numpy") == {"stages"}


# ---- What the docs promise of the whole code ---------------------------------------------------------


def test_only_prepare_and_base_may_use_the_network() -> None:
    """Two stages and one tool ask for the network. Every module is loaded behind `_stage` or `_tool`, which cut it."""
    source = (REPO / "stages" / "__main__.py").read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    online = {
        ast.literal_eval(call.args[0])
        for call in calls
        if any(word.arg == "network" and ast.unparse(word.value) == "True" for word in call.keywords)
    }
    assert online == {"prepare", "base", "remote"}
    loads = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "import_module"]
    wanted = [
        "import_module('stages.page.table')",
        "import_module(f'stages.tools.{name}')",
        "import_module(f'stages.{name}')",
    ]
    assert sorted(loads) == sorted(wanted)


def test_remote_code_is_never_run() -> None:
    """`trust_remote_code` is set nowhere, and pickles are read by `weights_only` alone."""
    for path in (REPO / "stages").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "pickle.load",
                "pickle.loads",
            ):
                assert any(word.arg == "weights_only" for word in node.keywords), (
                    f"{path}: {ast.unparse(node)}"
                )


@pytest.mark.parametrize("path", sorted(REPO.glob("requirements*.txt")), ids=lambda path: path.name)
def test_every_requirement_is_pinned(path: Path) -> None:
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    wanted = [line for line in lines if line and not line.startswith("-c ")]
    assert wanted
    for line in wanted:
        assert re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.]+( *; *.+)?", line), f"{path.name}: {line}"


def test_dvc_has_no_remote_to_push_to_by_default() -> None:
    """`dvc push` fails closed until a private remote is named in the git-ignored .dvc/config.local."""
    lines = [line.strip() for line in (REPO / ".dvc/config").read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if line] == ["[core]", "analytics = false", "check_update = false"]
    assert "config.local" in (REPO / ".dvc/.gitignore").read_text(encoding="utf-8")
