"""The command line: `python -m stages NAME`. `--help` lists every stage and tool.

The module of a stage or tool is imported when its command is called, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from stages.run.paths import HOME, LAST, LAST_ROUND, SHIPPED

if not all(map(find_spec, ("typer", "torch", "trl"))):
    # DVC runs the first python3 of the PATH, which is not the environment's when that is not activated.
    own = HOME / ".venv/bin/python"
    if not own.is_file() or sys.prefix == str(own.parents[1]):
        sys.exit(
            f"error: {sys.executable} lacks packages of requirements.txt; type `make`, or activate its environment"
        )
    os.execv(own, [str(own), "-m", "stages", *sys.argv[1:]])

from types import ModuleType
from typing import Annotated, Literal

import typer

from stages.run.errors import UserError
from stages.run.params import load_params
from stages.run.process import prepare_process

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="SFT → Regime W rollouts → preference pairs → DPO, measured on GSM8K Platinum.",
)
Policy = Annotated[str, typer.Argument(help="base, sft, or a round.")]
Round = Annotated[str, typer.Argument(metavar="ROUND", help="One of `rounds` in params.yaml.")]
OWN = r"{} \[default: the round's]"
Vote = Literal["s_end", "s_path", "s_cf", "s_wm", "reach", "logprob", "both", "all"]
STAGES, TOOLS = "Stages, in the order `dvc repro` runs them", "Tools"


def _stage(name: str, network: bool = False) -> ModuleType:
    """A stage's module, after the process is set up and all parameters are checked."""
    prepare_process(network)
    load_params()
    return import_module(f"stages.{name}")


def _tool(name: str, network: bool = False) -> ModuleType:
    """A tool's module, after the process is set up."""
    prepare_process(network)
    return import_module(f"stages.tools.{name}")


def _known(kind: Literal["policy", "round"], name: str) -> str:
    """The name of a policy or a round. Raises UserError when params.yaml has none of that name."""
    params = load_params()
    names = params.policy_names if kind == "policy" else params.chain
    if name not in names:
        raise UserError(f"{kind} '{name}' is unknown; choose one of {', '.join(names)}")
    return name


def _add_stage(name: str, about: str, network: bool = False) -> None:
    """Add the command of a stage that has no options."""
    app.command(name, help=about, rich_help_panel=STAGES)(lambda: _stage(name, network).main())


# ---- Stages ------------------------------------------------------------------------------------------

_add_stage("prepare", "Read or generate the problems; check, clean and split them.", network=True)
_add_stage("base", "Build, download or convert the base model.", network=True)
_add_stage("sft", "Fine-tune the base model on clean solutions (LoRA).")


@app.command(rich_help_panel=STAGES)
def rollout(round: Round = LAST_ROUND) -> None:
    """Let the policy that a round starts from answer training questions through every arm."""
    _stage("rollout").main(_known("round", round))


@app.command(rich_help_panel=STAGES)
def coherence(
    round: Round = LAST_ROUND,
    rollouts: Annotated[Path | None, typer.Option(help=OWN.format("Trajectories to score."))] = None,
    out: Annotated[Path | None, typer.Option(help=OWN.format("Where the scored ones go."))] = None,
    metrics: Annotated[Path | None, typer.Option(help=OWN.format("Where the summary goes."))] = None,
    plots: Annotated[Path | None, typer.Option(help=OWN.format("Folder of the plot data."))] = None,
) -> None:
    """Score the coherence of each trajectory and its reward (Regime W)."""
    _stage("coherence").main(_known("round", round), rollouts, out, metrics, plots)


@app.command(rich_help_panel=STAGES)
def preference(
    round: Round = LAST_ROUND,
    rollouts: Annotated[Path | None, typer.Option(help=OWN.format("Scored trajectories."))] = None,
    out: Annotated[Path | None, typer.Option(help=OWN.format("Where the pairs go."))] = None,
    metrics: Annotated[Path | None, typer.Option(help=OWN.format("Where the counts go."))] = None,
) -> None:
    """Make preference pairs from the scored trajectories."""
    _stage("preference").main(_known("round", round), rollouts, out, metrics)


@app.command(rich_help_panel=STAGES)
def dpo(round: Round = LAST_ROUND) -> None:
    """Train a round's DPO adapter from its pairs, starting at the adapter of the round before it."""
    _stage("dpo").main(_known("round", round))


@app.command(rich_help_panel=STAGES)
def evaluate(policy: Policy) -> None:
    """Evaluate a policy on Platinum: greedy answers and samples."""
    _stage("evaluate").main(_known("policy", policy))


@app.command(rich_help_panel=STAGES)
def vote(policy: Policy) -> None:
    """Let the samples of a policy vote for the answer by their coherence, without a model."""
    _stage("vote").main(_known("policy", policy))


_add_stage("headline", "Copy one policy's metrics to metrics/headline.json, for `dvc metrics diff`.")
_add_stage("report", "Compare the policies and write report.html.")


# ---- Tools -------------------------------------------------------------------------------------------


@app.command(rich_help_panel=TOOLS)
def check(
    gpu_memory: Annotated[
        float | None, typer.Option(help="Ask for GPUs of this size (GiB) in place of this machine's.", min=1)
    ] = None,
) -> None:
    """Validate everything without running anything, say whether it fits, and show the first prompts."""
    _tool("check").main(gpu_memory=gpu_memory)


@app.command(rich_help_panel=TOOLS)
def repro() -> None:
    """Run what is out of date with the time left, print the table, compare the bytes with the committed ones."""
    _tool("repro").main()


@app.command(rich_help_panel=TOOLS)
def results(
    experiment: Annotated[
        str | None, typer.Argument(help="With --experiments: the chosen one, to be shown on Platinum too.")
    ] = None,
    experiments: Annotated[
        bool, typer.Option("--experiments", help="List DVC's experiments by validation.")
    ] = False,
) -> None:
    """Print the result table of the last run, or of all experiments of this commit."""
    if experiments:
        _tool("experiments").main(experiment)
    elif experiment:
        raise UserError(
            f"results: '{experiment}' names an experiment; say `results --experiments {experiment}`"
        )
    else:
        prepare_process()
        import_module("stages.page.table").print_results()


@app.command(rich_help_panel=TOOLS)
def plan(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages, as for `dvc repro`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what `dvc repro` would run, why, what may follow, and how long it took last time."""
    _tool("plan").main(targets or [], as_json)


@app.command(rich_help_panel=TOOLS)
def runs() -> None:
    """List the stages run on this machine: when, how long, how much memory."""
    _tool("runs").main()


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
    samples: Annotated[str | None, typer.Option(help=r"Field of drawn texts. \[default: samples]")] = None,
    vote: Annotated[Vote | None, typer.Option(help="Let the samples vote, weighted by this signal.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the graded log goes.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count bad lines and go on.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Grade a log of completions from anywhere, and print its metrics."""
    tool = _tool("grade")
    names = tool.FieldNames(completion, gold, question, id, samples)
    tool.main(files, names, out, skip_bad, as_json, vote)


@app.command(rich_help_panel=TOOLS)
def compare(
    a: Annotated[Path, typer.Argument(help="Graded log, the one before.")],
    b: Annotated[Path, typer.Argument(help="Graded log, the one after.")],
    id: Annotated[str, typer.Option(help="Field of the question's id.")] = "id",
    correct: Annotated[str, typer.Option(help="Field of the verdict.")] = "correct",
    vote: Annotated[
        Vote | None, typer.Option(help="Compare what the samples elect, weighted by this signal.")
    ] = None,
    show: Annotated[
        tuple[str, int] | None, typer.Option(help="Print some questions: gained or lost, and how many.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as JSON.")] = False,
) -> None:
    """Compare two graded logs of the same questions, with paired statistics."""
    _tool("compare").main(a, b, id, correct, show, as_json, vote)


@app.command(rich_help_panel=TOOLS)
def changed(
    file: Annotated[Path, typer.Argument(help="JSONL questions with worked solutions.")],
    out: Annotated[Path, typer.Option(help="Where the changed questions go.")],
    every: Annotated[bool, typer.Option("--all", help="Change each number in turn, not one.")] = False,
    seed: Annotated[int, typer.Option(help="Another seed, other numbers.")] = 0,
) -> None:
    """Make changed questions: one number is another, and the new answer follows from the solution."""
    _tool("changed").main(file, out, "all" if every else "one", seed)


@app.command(rich_help_panel=TOOLS)
def ask(
    question: Annotated[str, typer.Argument(help="The question, in quotes; - is the standard input.")],
    policy: Annotated[str, typer.Option(help="Who answers: base, sft, or a round.")] = LAST_ROUND,
    temperature: Annotated[
        float, typer.Option(min=0, max=5, help="0 is greedy: always the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn above temperature 0.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help=r"Where it is cut. \[default: the evaluation's]")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, max=1024, help="Draw so many, and let them vote by their coherence.")
    ] = 1,
) -> None:
    """Put a question to a policy, and see its solution as it is written."""
    _tool("ask").main(question, _known("policy", policy), temperature, seed, max_new_tokens, samples)


@app.command(rich_help_panel=TOOLS)
def explain(
    question_id: Annotated[str, typer.Argument(help="A question's id, such as train-00017.")],
    rollouts: Annotated[
        Path | None,
        typer.Option(help=r"Scored trajectories. \[default: those of the last round that asked it]"),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Show the texts too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as data.")] = False,
) -> None:
    """Show one question: what was read of its trajectories, their scores, rewards and pairs."""
    _tool("explain").main(question_id, rollouts, text, as_json)


@app.command(rich_help_panel=TOOLS)
def pairs(
    sample: Annotated[int, typer.Option(min=1, help="How many pairs.")] = 5,
    kind: Annotated[
        Literal["coherence", "correctness"] | None, typer.Option(help="Only pairs of this kind.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="Only pairs of this question's id.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, other pairs.")] = 0,
    pairs: Annotated[Path, typer.Option(help="The file of pairs.")] = LAST.pairs,
) -> None:
    """Show some preference pairs side by side, with what differs marked."""
    _tool("pairs").main(pairs, sample, kind, question, seed)


@app.command(rich_help_panel=TOOLS)
def suspects(
    rollouts: Annotated[Path, typer.Option(help="Scored trajectories.")] = LAST.scored,
    limit: Annotated[int, typer.Option(min=1, help="How many questions to show.")] = 20,
    from_: Annotated[
        float | None,
        typer.Option("--from", min=0, max=1, help=r"Threshold. \[default: regime_w.suspect_from]"),
    ] = None,
) -> None:
    """List the questions whose gold label is suspect, with the evidence."""
    _tool("suspects").main(rollouts, limit, from_)


@app.command(rich_help_panel=TOOLS)
def trace(
    name: Annotated[str, typer.Argument(metavar="ID", help="Of a pair (quoted) or a question.")],
    text: Annotated[bool, typer.Option("--text", help="Show the texts too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as data.")] = False,
) -> None:
    """Show where a pair or an answer came from: adapters, pairs, trajectories, arms, seeds; every link checked."""
    _tool("trace").main(name, text, as_json)


@app.command(rich_help_panel=TOOLS)
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, outside of this repository.")],
    policy: Annotated[str, typer.Option(help="Which policy: base, sft, or a round.")] = LAST_ROUND,
    precision: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="Without it, the base's.")
    ] = None,
    questions: Annotated[
        int, typer.Option(min=0, help="Questions to compare with the unmerged policy; 0 compares nothing.")
    ] = 50,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in DIR.")] = False,
) -> None:
    """Merge a policy's adapter into a model folder that any server can load, with a model card."""
    _tool("export").main(folder, _known("policy", policy), precision, questions, force)


@app.command(rich_help_panel=TOOLS)
def pretrain(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    record: Annotated[Path, typer.Option(help="The settings: a record.json.")] = SHIPPED / "record.json",
) -> None:
    """Make a small base model from nothing, as the shipped one was made."""
    _tool("pretrain").main(folder, record)


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
    repair: Annotated[
        bool, typer.Option("--repair", help="Send missing and corrupt ones again from this machine.")
    ] = False,
) -> None:
    """Check that a remote is allowed and private, that it works, and that what was pushed is whole."""
    _tool("remote", network=True).main(name, objects, repair)


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
