"""dvc.yaml says what the code really uses: no less, so that nothing stale is kept; no more, so that nothing
reruns for no reason. And the code keeps the layering that makes this possible."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.core import code

REPO = Path(__file__).resolve().parents[2]
STAGES = [
    "prepare",
    "base",
    "sft",
    "rollout",
    "coherence",
    "preference",
    "dpo",
    "evaluate",
    "headline",
    "report",
]
MODULES = sorted(path.relative_to(REPO) for path in (REPO / "stages").rglob("*.py"))
STAGE_MODULES = {f"stages.{name}" for name in STAGES}


project_files = cache(code.project_files)


def declared(name: str) -> dict[str, Any]:
    stage = YAML(typ="safe").load((REPO / "dvc.yaml").read_text(encoding="utf-8"))["stages"][name]
    return stage.get("do", stage)


def declared_sections(name: str) -> set[str]:
    """The sections of the parameters that dvc.yaml gives to a stage."""
    sections = set()
    for entry in declared(name).get("params", []):
        keys = [entry] if isinstance(entry, str) else [key for values in entry.values() for key in values]
        sections |= {key.split(".")[0] for key in keys}
    return sections


def imports(path: Path) -> set[str]:
    """All modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((REPO / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            inside = {f"{module}.{alias.name}" for alias in node.names}
            modules = {
                name for name in inside if (REPO / name.replace(".", "/")).with_suffix(".py").is_file()
            }
            found |= modules or {module}
    return found


def test_the_pipeline_has_the_stages_of_the_design() -> None:
    stages = YAML(typ="safe").load((REPO / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert list(stages) == STAGES


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_says_what_it_does(name: str) -> None:
    stage = declared(name)
    assert len(stage["desc"]) > 20
    assert "\n" not in stage["cmd"], "DVC runs each line in a shell of its own"
    assert stage["cmd"].startswith(f"python -m stages {name}")


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_all_code_it_imports(name: str) -> None:
    deps = [Path(dep) for dep in declared(name)["deps"]]
    used = project_files(REPO / "stages" / f"{name}.py")
    missing = [
        path.as_posix() for path in used if not any(dep == path or dep in path.parents for dep in deps)
    ]
    assert not missing, f"{name}: dvc.yaml does not name {missing}, so a change there would rerun nothing"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_no_other_code(name: str) -> None:
    used = set(project_files(REPO / "stages" / f"{name}.py"))
    source = (REPO / "stages" / f"{name}.py").read_text(encoding="utf-8")
    for dep in map(Path, declared(name)["deps"]):
        if dep.parts[0] != "stages":
            continue
        if dep.suffix == ".py":
            assert dep in used, f"{name}: a change of {dep} would rerun it for no reason"
        else:  # a folder: of code it imports, or of files it names
            assert any(dep in path.parents for path in used) or f'"{dep.name}"' in source, f"{name}: {dep}"


@pytest.mark.parametrize("name", STAGES)
def test_a_stages_params_are_the_sections_it_reads(name: str) -> None:
    """A value that is read and not declared would not rerun the stage; `hardware` may never be declared."""
    in_dvc = declared_sections(name)
    calls = [
        node
        for node in ast.walk(ast.parse((REPO / "stages" / f"{name}.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "stage_run"
    ]
    assert len(calls) == 1
    assert isinstance(calls[0].args[0], ast.Constant)
    assert calls[0].args[0].value == name
    sections = next(word.value for word in calls[0].keywords if word.arg == "sections")
    assert set(ast.literal_eval(sections)) == in_dvc
    assert "hardware" not in in_dvc


@pytest.mark.parametrize("name", STAGES)
def test_sections_read_past_stage_run_are_declared_too(name: str) -> None:
    """`load_params().x` in a stage skips the check of declared sections, so x must be one of them."""
    source = (REPO / "stages" / f"{name}.py").read_text(encoding="utf-8")
    assert set(re.findall(r"load_params\(\)\.(\w+)", source)) <= declared_sections(name)


@pytest.mark.parametrize("name", STAGES)
def test_no_stage_imports_another(name: str) -> None:
    for path in project_files(REPO / "stages" / f"{name}.py"):
        others = imports(path) & (STAGE_MODULES - {f"stages.{name}"})
        assert not others, f"{path} imports {others}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[1] == "core"], ids=str)
def test_core_knows_nothing_of_stages_and_tools(path: Path) -> None:
    for module in imports(path):
        assert module not in STAGE_MODULES, f"{path} imports {module}"
        assert not module.startswith(("stages.tools", "stages.tiny", "stages.regime_w", "stages.__main__"))


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[1] == "regime_w"], ids=str)
def test_regime_w_needs_the_standard_library_and_numpy_only(path: Path) -> None:
    """It is the private part: it must be easy to replace, and start at once."""
    for module in imports(path):
        top = module.split(".")[0]
        own = module.startswith("stages.regime_w.") or module in ("stages.core.answers", "stages.core.errors")
        assert top in sys.stdlib_module_names or top == "numpy" or own, f"{path} imports {module}"


@pytest.mark.parametrize("name", ["evaluate", "dpo", "sft", "base"])
def test_nothing_of_regime_w_is_needed_for_inference_and_training(name: str) -> None:
    """The coherence score is private; what trains and answers gets along without it."""
    assert not [path for path in project_files(REPO / "stages" / f"{name}.py") if "regime_w" in path.parts]


def test_only_prepare_and_base_may_use_the_network() -> None:
    """Every command settles the process before it does anything; two stages and one tool ask for the network."""
    tree = ast.parse((REPO / "stages" / "__main__.py").read_text(encoding="utf-8"))
    online, prepared = set(), set()
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
        for call in [node for node in ast.walk(function) if isinstance(node, ast.Call)]:
            if isinstance(call.func, ast.Name) and call.func.id in ("prepare_process", "_begin"):
                prepared.add(function.name)
                if function.name != "_begin" and (call.keywords or call.args):
                    online.add(function.name)
    assert online == {"prepare", "base", "remote_check"}
    assert set(STAGES) <= prepared


def test_remote_code_is_never_run() -> None:
    """`trust_remote_code` is set nowhere, and a pickle is read in no other way than by weights alone."""
    for path in MODULES:
        for node in ast.walk(ast.parse((REPO / path).read_text(encoding="utf-8"))):
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
    config = configparser.ConfigParser()
    config.read_string("\n".join(line.strip() for line in (REPO / ".dvc/config").read_text().splitlines()))
    assert "remote" not in config["core"]
    assert config.sections() == ["core"]
    assert config["core"]["analytics"] == "false"
    assert "config.local" in (REPO / ".dvc/.gitignore").read_text()
