"""What README and docs name exists: files, links, commands, parameters."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.__main__ import app
from stages.run.params import load_params

REPO = Path(__file__).resolve().parents[1]
PAGES = sorted([REPO / "README.md", REPO / "SECURITY.md", *(REPO / "docs").rglob("*.md")])
BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())

# What a page may name though git does not hold it: made by a run, or by the reader.
MADE = ("data", "checkpoints", "metrics", "report.html", ".venv", ".work", ".dvc", "dvc.lock", "..")
FOLDERS = ("stages", "docs", "tests", "bench", "profiles", "scripts")


@BY_NAME
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in anchors, f"{page.name} links to {target}"


@BY_NAME
def test_files_named_in_the_text_exist(page: Path) -> None:
    """Names in backquotes that look like a path of this project."""
    for name in re.findall(r"`([\w./@-]+)`", page.read_text(encoding="utf-8")):
        first = name.split("/")[0]
        of_ours = re.match(r"[\w-]+\.(md|txt|yaml|toml|html|lock)$", name) or (
            first in FOLDERS and "/" in name
        )
        if of_ours and first not in MADE:
            places = [REPO / name, page.parent / name, REPO / "docs" / name, REPO / "profiles" / name]
            assert any(place.exists() for place in places), f"{page.name} names {name}"


@BY_NAME
def test_commands_exist(page: Path) -> None:
    commands = {one.name or one.callback.__name__ for one in app.registered_commands if one.callback}
    commands |= {one.name for one in app.registered_groups if one.name}
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"python -m stages ([a-z][\w-]*)", text)) <= commands
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)\b(?=`|\s|$)", text, re.MULTILINE)) <= targets


@BY_NAME
def test_parameters_named_with_dots_exist(page: Path) -> None:
    """`regime_w.weights.s_cf` and the like, in backquotes or after `-S`."""
    text = page.read_text(encoding="utf-8")
    sections = "regime_w|preference|headline|sft|rollout|dpo|evaluate|hardware"
    names = re.findall(rf"`((?:{sections})\.[\w.]+)`", text) + re.findall(r"-S ((?:\w+\.)*\w+)=", text)
    for name in names:
        place = load_params(REPO).model_dump(mode="json")
        for part in name.split("."):
            assert isinstance(place, dict), f"{page.name}: {name}"
            assert part in place, f"{page.name}: {name}"
            place = place[part]


def test_readme_leads_to_every_page() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(REPO).as_posix() for page in PAGES if page.name != "README.md"]
    assert [page for page in pages if f"]({page})" not in text] == []


def test_the_picture_is_that_of_the_pipeline(tmp_path: Path) -> None:
    """docs/pipeline.md shows what `dvc dag --md` prints; REFRESH=1 in the environment writes it anew."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy2(REPO / name, tmp_path / name)
    shutil.copytree(REPO / "profiles", tmp_path / "profiles")
    shutil.copytree(REPO / ".dvc", tmp_path / ".dvc", ignore=lambda folder, names: {*names} - {"config"})
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    dag = [sys.executable, "-m", "dvc", "dag", "--md"]
    done = subprocess.run(dag, cwd=tmp_path, capture_output=True, text=True, check=True)
    drawn = done.stdout.strip().replace("\t", "    ")
    page = REPO / "docs" / "pipeline.md"
    before, rest = page.read_text(encoding="utf-8").split("<!-- picture -->\n")
    shown, after = rest.split("<!-- end of picture -->")
    if os.environ.get("REFRESH"):
        text = f"{before}<!-- picture -->\n{drawn}\n<!-- end of picture -->{after}"
        page.write_text(text, encoding="utf-8")
    else:
        assert shown.strip() == drawn, "REFRESH=1 python -m pytest tests/test_docs.py -k picture"
