"""Frames the work of every stage: checks inputs, holds a lock, writes a manifest, notes facts about the run.

    with stage_run("coherence", sections=("regime_w",), inputs=[rollouts], outputs=[out, metrics]) as run:
        ...  # run.params.regime_w, run.work, run.progress(...)

The manifest (sha256 of inputs and outputs, the parameters read) lies in an output folder or beside the first output
file. It holds nothing that differs between identical runs. Time and memory go to `.work/runs/`.

Half-done work lies in `.work/<stage>/<fingerprint>/`. The fingerprint covers the parameters, the inputs, and the code
that dvc.yaml lists for the stage. So a stage goes on after a kill unless one of these has changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.run.code import code_files
from stages.run.errors import UserError
from stages.run.files import read_json, sha256_file, write_json
from stages.run.guard import end_with_parent, leave_on_sigterm, name_full_disk
from stages.run.journal import Journal
from stages.run.pace import time_left, words
from stages.run.params import Sections, load_params
from stages.run.paths import ROOT, WORK

if TYPE_CHECKING:
    from rich.console import Console

MANIFEST = "manifest.json"
NOTED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm", "dvc")


@dataclass(eq=False)
class StageRun:
    """One run of one stage: its parameters, its scratch folder, its progress display."""

    name: str
    params: Sections
    work: Path
    console: Console
    facts: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    @property
    def variant(self) -> str:
        """What distinguishes this run of the stage: its round, or the policy that it evaluates."""
        return self.name.partition("@")[2]

    def finish(self, message: str) -> None:
        """Print the line of the finished stage: what it did, how long it took, how long the rest may take."""
        times = [words(time.time() - self.started), time_left(self.name)]
        self.say(f"{message}  [dim]{', '.join(filter(None, times))}[/dim]")

    def say(self, message: str) -> None:
        """Print one line about what the stage did."""
        self.console.print(f"[bold]{self.name}[/bold]  {message}", highlight=False)

    @contextlib.contextmanager
    def journal(self) -> Iterator[Journal]:
        """The stage's journal with what an earlier run finished; reports damaged records."""
        with Journal(self.work / "journal.jsonl") as journal:
            if journal.damaged:
                self.say(
                    f"{journal.damaged:,} damaged records of an earlier run set aside in "
                    f"{journal.path}.damaged; they are done again"
                )
            yield journal

    @contextlib.contextmanager
    def progress(self, what: str, total: int, unit: str, done: int = 0) -> Iterator[Any]:
        """Show progress with rate and time left; yields `advance(n=1, note="")`.

        On a terminal it is a live bar, in a log file one line at most every 30 seconds.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        started = last_line = time.monotonic()
        with Progress(
            TextColumn(f"[bold]{self.name}[/bold]  {what}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit + "  {task.fields[rate]}  {task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as bar:
            task = bar.add_task(what, total=total, completed=done, rate="", note="")

            def advance(n: int = 1, note: str = "") -> None:
                nonlocal last_line
                now, count = time.monotonic(), bar.tasks[0].completed + n
                rate = (count - done) / max(now - started, 1e-9)
                bar.update(task, advance=n, rate=f"{rate:,.1f}/s", note=note)
                if not self.console.is_terminal and now - last_line > 30:
                    last_line = now
                    left = (total - count) / max(rate, 1e-9)
                    self.say(
                        f"{what}: {count:,} of {total:,} {unit}, {rate:,.1f}/s, {left:,.0f} s left {note}"
                    )

            yield advance
        self.facts.setdefault("seconds_of", {})[what] = round(time.monotonic() - started, 3)


@contextlib.contextmanager
def stage_run(
    name: str,
    *,
    sections: tuple[str, ...],
    inputs: Sequence[Path],
    outputs: Sequence[Path],
    variant: str = "",
) -> Iterator[StageRun]:
    """Frame one stage's work. `variant` distinguishes runs of one stage: the round, or the policy.

    When the block ends, all `outputs` must be there; their manifest is written then. Raises UserError when an input is
    missing, a parameter is wrong, an output cannot be written, or the same stage is already running.
    """
    from rich.console import Console

    end_with_parent()
    leave_on_sigterm()
    label = f"{name}@{variant}" if variant else name
    params = Sections(load_params(), sections, variant)
    inputs_seen = {path.as_posix(): _fingerprint_input(path) for path in inputs}
    identity = {"stage": label, "params": params.read(), "inputs": inputs_seen}
    code = [[path.as_posix(), sha256_file(ROOT / path)] for path in code_files(name)]
    fingerprint = hashlib.sha256(json.dumps([identity, code], sort_keys=True).encode()).hexdigest()[:16]

    console = Console(stderr=True, soft_wrap=True)
    with _lock(WORK / label):
        _clear_other_progress(WORK / label, keep=fingerprint)
        _make_way(outputs)
        run = StageRun(label, params, WORK / label / fingerprint, console)
        started, when = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with name_full_disk(label, WORK):
            yield run
        if missing := [path.as_posix() for path in outputs if not path.exists()]:
            raise RuntimeError(f"{label} ended without writing {', '.join(missing)}")
        write_manifest(identity, outputs)
        _note_facts(run, when, time.monotonic() - started)
        with contextlib.suppress(OSError):  # the next run clears what is left
            _clear_other_progress(WORK / label, keep=None)


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output lies: inside a folder, or beside a file."""
    return output / MANIFEST if output.is_dir() else output.with_name(f"{output.stem}.{MANIFEST}")


def write_manifest(identity: dict[str, Any], outputs: Sequence[Path]) -> None:
    """Write the manifest of `outputs`: sha256 of every file in them, and the run's identity."""
    target = manifest_path(outputs[0])
    files = [f for out in outputs for f in ([out] if out.is_file() else sorted(out.rglob("*")))]
    hashes = {f.as_posix(): sha256_file(f) for f in files if f.is_file() and f != target}
    write_json(target, {**identity, "outputs": dict(sorted(hashes.items()))})


def _fingerprint_input(path: Path) -> str:
    if path.is_file():
        return sha256_file(path)
    if (path / MANIFEST).is_file():
        return sha256_file(path / MANIFEST)
    if path.is_dir():
        raise UserError(f"{path}: has no {MANIFEST}, so it was not made by this pipeline; run `dvc repro`")
    raise UserError(f"{path}: is missing; run `dvc repro`, or `dvc pull` to fetch it")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); check its owner and the disk"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder.name}: another run of this stage is going on; wait for it, or end it"
            ) from None
        yield


def _clear_other_progress(folder: Path, keep: str | None) -> None:
    gone = folder / "gone"
    shutil.rmtree(gone, ignore_errors=True)
    for path in folder.iterdir():
        if path.is_dir() and path.name != keep:
            # Rename it first: a kill in the middle of the removal must not leave a part that a later run goes on from.
            path.replace(gone)
            shutil.rmtree(gone)


def _make_way(outputs: Sequence[Path]) -> None:
    """Check that every output can be written, before the work begins, and remove what a kill left there."""
    for path in [*outputs, *map(manifest_path, outputs)]:
        place = next(folder for folder in path.absolute().parents if folder.exists())
        # os.access also notices a read-only file system.
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise UserError(f"{path}: cannot be written; check what {place} is, its owner and its disk")
        for left in path.parent.glob(f".{path.name}.*.tmp"):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def _note_facts(run: StageRun, when: str, seconds: float) -> None:
    revision = None
    with contextlib.suppress(OSError):  # no git on this machine
        command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    facts = {
        "stage": run.name,
        "started": when,
        "seconds": round(seconds, 3),
        "peak_memory_mib": _peak_memory(),
        "revision": revision,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {one.name: one.version for one in metadata.distributions() if one.name in NOTED_PACKAGES},
        **run.facts,
    }
    write_json(WORK / "runs" / f"{when.replace(':', '')}-{run.name}.json", facts)


def _peak_memory() -> int:
    """MiB that the largest process of this stage held at once: this one, or one that it started and that has ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return round(max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024)


def last_runs() -> list[dict[str, Any]]:
    """The facts of all runs on this machine, oldest first."""
    return [read_json(path) for path in sorted((WORK / "runs").glob("*.json"))]
