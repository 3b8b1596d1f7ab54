"""The one door: `python -m stages NAME`. `--help` lists every stage and tool."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from stages.core.errors import UserError
from stages.core.launch import prepare_process
from stages.core.params import load_params

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="SFT → Regime W rollouts → preference pairs → DPO, measured on GSM8K Platinum.",
)
STAGES, TOOLS = "Stages, in the order `dvc repro` runs them", "Tools"


@app.command(rich_help_panel=STAGES)
def prepare() -> None:
    """Read or generate the problems; check, clean and split them."""
    _begin(network=True)
    from stages import prepare as stage

    stage.main()


@app.command(rich_help_panel=STAGES)
def base() -> None:
    """Build, download or convert the base model."""
    _begin(network=True)
    from stages import base as stage

    stage.main()


@app.command(rich_help_panel=STAGES)
def sft() -> None:
    """Fine-tune the base model on clean solutions (LoRA)."""
    _begin()
    from stages import sft as stage

    stage.main()


@app.command(rich_help_panel=STAGES)
def rollout() -> None:
    """Let the SFT policy answer training questions through every arm."""
    _begin()
    from stages import rollout as stage

    stage.main()


@app.command(rich_help_panel=STAGES)
def coherence(
    rollouts: Annotated[Path, typer.Option(help="Trajectories to score.")] = Path("data/rollouts.jsonl"),
    out: Annotated[Path, typer.Option(help="Where the scored ones go.")] = Path(
        "data/regime_w_rollouts.jsonl"
    ),
    metrics: Annotated[Path, typer.Option(help="Where the summary goes.")] = Path("metrics/regime_w.json"),
    plots: Annotated[Path, typer.Option(help="Folder of the plot data.")] = Path("metrics/plots/regime_w"),
) -> None:
    """Score the coherence of each trajectory and its reward (Regime W)."""
    _begin()
    from stages import coherence as stage

    stage.main(rollouts, out, metrics, plots)


@app.command(rich_help_panel=STAGES)
def preference(
    rollouts: Annotated[Path, typer.Option(help="Scored trajectories.")] = Path(
        "data/regime_w_rollouts.jsonl"
    ),
    out: Annotated[Path, typer.Option(help="Where the pairs go.")] = Path("data/coherence_preferences.jsonl"),
    metrics: Annotated[Path, typer.Option(help="Where the counts go.")] = Path("metrics/preference.json"),
) -> None:
    """Make preference pairs from the scored trajectories."""
    _begin()
    from stages import preference as stage

    stage.main(rollouts, out, metrics)


@app.command(rich_help_panel=STAGES)
def dpo() -> None:
    """Train the DPO adapter from the pairs, starting at the SFT adapter."""
    _begin()
    from stages import dpo as stage

    stage.main()


@app.command(rich_help_panel=STAGES)
def evaluate(policy: Annotated[str, typer.Argument(help="base, sft or dpo")]) -> None:
    """Evaluate a policy on Platinum: greedy answers and samples."""
    _begin()
    from stages import evaluate as stage

    if policy not in stage.ADAPTERS:
        raise UserError(f"evaluate: no policy '{policy}'; choose one of {', '.join(stage.ADAPTERS)}")
    stage.main(policy)


@app.command(rich_help_panel=STAGES)
def headline() -> None:
    """Copy one policy's metrics to metrics/headline.json, for `dvc metrics diff`."""
    _begin()
    from stages import headline as stage

    stage.main()


@app.command(rich_help_panel=STAGES)
def report() -> None:
    """Compare the policies and write report.html."""
    _begin()
    from stages import report as stage

    stage.main()


@app.command(rich_help_panel=TOOLS)
def check(
    gpu_memory: Annotated[
        float | None, typer.Option(help="Ask for GPUs of this size (GiB) in place of this machine's.", min=1)
    ] = None,
) -> None:
    """Validate everything without running anything, say whether it fits, and show the first prompts."""
    prepare_process()
    from stages.tools import check as tool

    tool.main(gpu_memory=gpu_memory)


@app.command(rich_help_panel=TOOLS)
def results() -> None:
    """Print the result table of the last run."""
    prepare_process()
    from stages.core.table import print_results

    print_results()


@app.command(rich_help_panel=TOOLS)
def plan(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages, as for `dvc repro`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what `dvc repro` would run, why, what may follow, and how long it took last time."""
    _begin()
    from stages.tools import plan as tool

    tool.main(targets or [], as_json)


@app.command(rich_help_panel=TOOLS)
def runs(versions: Annotated[bool, typer.Option(help="Show package versions too.")] = False) -> None:
    """List the stages run on this machine: when, how long, how much memory."""
    prepare_process()
    from stages.tools import runs as tool

    tool.main(versions)


@app.command(rich_help_panel=TOOLS)
def grade(
    files: Annotated[
        list[str], typer.Argument(help="JSONL logs, the parts of one; - is the standard input.")
    ],
    completion: Annotated[
        str, typer.Option(help="Field of the text to grade; dots lead inside.")
    ] = "completion",
    gold: Annotated[str, typer.Option(help="Field of the right answer.")] = "gold",
    question: Annotated[str | None, typer.Option(help=r"Field of the question. \[default: question]")] = None,
    id: Annotated[str | None, typer.Option(help=r"Field of the question's id. \[default: id]")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the graded log goes.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count bad lines and go on.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Grade a log of completions from anywhere, and print its metrics."""
    prepare_process()
    from stages.tools import grade as tool

    tool.main(files, tool.Fields(completion, gold, question, id), out, skip_bad, as_json)


@app.command(rich_help_panel=TOOLS)
def compare(
    a: Annotated[Path, typer.Argument(help="Graded log, the one before.")],
    b: Annotated[Path, typer.Argument(help="Graded log, the one after.")],
    id: Annotated[str, typer.Option(help="Field of the question's id.")] = "id",
    correct: Annotated[str, typer.Option(help="Field of the verdict.")] = "correct",
    show: Annotated[
        tuple[str, int] | None, typer.Option(help="Print some questions: gained or lost, and how many.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as JSON.")] = False,
) -> None:
    """Compare two graded logs of the same questions, with paired statistics."""
    prepare_process()
    from stages.tools import compare as tool

    tool.main(a, b, id, correct, show, as_json)


@app.command(rich_help_panel=TOOLS)
def ask(
    question: Annotated[
        str | None, typer.Argument(help="The question; - reads stdin; without one, a prompt.")
    ] = None,
    policy: Annotated[str, typer.Option(help="base, sft or dpo")] = "dpo",
    temperature: Annotated[float, typer.Option(help="0 is greedy: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn above temperature 0.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help=r"Where it is cut. \[default: the evaluation's]")
    ] = None,
) -> None:
    """Put a question to a policy, and see its solution as it is written."""
    _begin()
    from stages.tools import ask as tool

    tool.main(question, policy, temperature, seed, max_new_tokens)


@app.command(rich_help_panel=TOOLS)
def explain(
    question_id: Annotated[str, typer.Argument(help="A question's id, such as train-00017.")],
    rollouts: Annotated[Path, typer.Option(help="Scored trajectories.")] = Path(
        "data/regime_w_rollouts.jsonl"
    ),
    pairs: Annotated[
        Path | None, typer.Option(help=r"Pairs. \[default: data/coherence_preferences.jsonl]")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Show the texts too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as data.")] = False,
) -> None:
    """Show one question: what was read of its trajectories, their scores, rewards and pairs."""
    prepare_process()
    from stages.tools import explain as tool

    tool.main(question_id, rollouts, pairs, text, as_json)


@app.command(rich_help_panel=TOOLS)
def pairs(
    sample: Annotated[int, typer.Option(min=1, help="How many pairs.")] = 5,
    kind: Annotated[str | None, typer.Option(help="coherence or correctness; both otherwise.")] = None,
    question: Annotated[str | None, typer.Option(help="Only pairs of this question's id.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, other pairs.")] = 0,
    pairs: Annotated[Path, typer.Option(help="The file of pairs.")] = Path(
        "data/coherence_preferences.jsonl"
    ),
) -> None:
    """Show some preference pairs side by side, with what differs marked."""
    prepare_process()
    from stages.tools import pairs as tool

    tool.main(pairs, sample, kind, question, seed)


@app.command(rich_help_panel=TOOLS)
def suspects(
    rollouts: Annotated[Path, typer.Option(help="Scored trajectories.")] = Path(
        "data/regime_w_rollouts.jsonl"
    ),
    limit: Annotated[int, typer.Option(min=1, help="How many questions to show.")] = 20,
    from_: Annotated[
        float | None,
        typer.Option("--from", min=0, max=1, help=r"Threshold. \[default: regime_w.suspect_from]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as data.")] = False,
) -> None:
    """List the questions whose gold label is suspect, with the evidence."""
    prepare_process()
    from stages.tools import suspects as tool

    tool.main(rollouts, limit, from_, as_json)


@app.command(rich_help_panel=TOOLS)
def trace(
    name: Annotated[str, typer.Argument(metavar="ID", help="Of a pair (quoted) or a question.")],
    text: Annotated[bool, typer.Option("--text", help="Show the texts too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as data.")] = False,
) -> None:
    """Show where a pair or an answer came from: adapters, pairs, trajectories, arms, seeds; every link checked."""
    prepare_process()
    from stages.tools import trace as tool

    tool.main(name, text, as_json)


@app.command(rich_help_panel=TOOLS)
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, outside of this repository.")],
    policy: Annotated[str, typer.Option(help="base, sft or dpo")] = "dpo",
    precision: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; without it, the base's.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "4GB",
    questions: Annotated[
        int, typer.Option(min=0, help="Questions to compare with the unmerged policy; 0 compares nothing.")
    ] = 50,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in DIR.")] = False,
) -> None:
    """Merge a policy's adapter into a model folder that any server can load, with a model card."""
    _begin()
    from stages.tools import export as tool

    tool.main(folder, policy, precision, max_shard_size, questions, force)


remote_app = typer.Typer(no_args_is_help=True, help="The private storage of the artifacts.")
app.add_typer(remote_app, name="remote", rich_help_panel=TOOLS)


@remote_app.command("check")
def remote_check(
    name: Annotated[
        str | None, typer.Argument(help="The remote; without it DVC's default one, or the only one.")
    ] = None,
    objects: Annotated[
        bool, typer.Option("--objects/--no-objects", help="Hash the objects of dvc.lock that are there.")
    ] = True,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Hash only so many of them, drawn by chance.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Send missing and corrupt ones again from this machine.")
    ] = False,
) -> None:
    """Check that a remote is allowed and private, that it works, and that what was pushed is whole."""
    prepare_process(network=True)
    from stages.tools import remote as tool

    tool.main(name, objects, sample, repair)


def _begin(network: bool = False) -> None:
    """Settle the process, and check all parameters before the slow imports."""
    prepare_process(network)
    load_params()


def main() -> None:
    """Run a command; a user's mistake ends in one line on stderr and exit status 1."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
