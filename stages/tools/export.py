"""`python -m stages export --policy dpo DIR`: writes a policy as one model folder, for any program that serves models.

PEFT merges the adapter into the base. Then this tool loads the folder as anyone would, and compares it with the
unmerged policy on some questions: the weights were rounded to the chosen precision, which can change answers.
README.md, the model card, is made from the run; export.json holds the same facts as data. DIR appears whole or not
at all.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.run.errors import UserError
from stages.run.files import atomic_folder, atomic_write, read_json, read_jsonl, sha256_file, write_json
from stages.run.guard import leave_on_sigterm
from stages.run.history import AS_RECORDED, History, broken, settings, trained_by
from stages.run.params import Evaluate, Params, Prompt, load_params
from stages.run.paths import BASE, LAST_ROUND, PLATINUM, PLATINUM_DETAILS, PLATINUM_EVAL
from stages.run.process import fix_arithmetic
from stages.run.rounds import adapter_of, shown, trainer_of
from stages.run.stage import MANIFEST
from stages.stats.one import BOOTSTRAP_SEED
from stages.text.prompts import prompt_ids, prompt_text
from stages.tools.ask import check_checkpoints
from stages.tools.show import EXAMPLE, first_line, new_console

FACTS = "export.json"
CARD = "README.md"
TEMPLATE = "model_card.md.j2"
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
LARGEST_FILE = "4GB"  # of the weights
LOGIT_BYTES = 2**30  # of the logits of each model, kept for the comparison
PRIVATE = ("path", "train", "platinum", "scorer")  # parameters that may name a place on this machine


def main(
    folder: Path,
    policy: str = LAST_ROUND,
    precision: str | None = None,
    questions: int = 50,
    force: bool = False,
) -> None:
    """Write `policy` into `folder`, in `precision` (None: that of the base), and print how it compares.

    Raises UserError when the folder holds something, or the checkpoints are not what their manifests say.
    """
    params = load_params()
    check_checkpoints(policy)
    console = new_console()
    leave_on_sigterm()
    with _in_one_line(folder):
        _check_folder(folder, force)
        history = History()
        _check_weights(policy, history)
        prompt, spec = _recorded_settings(policy, history, params)
        _remove_left_by_kills(folder)
        with atomic_folder(folder) as fresh, console.status("merging") as status:
            written = write_model(policy, precision, spec.max_new_tokens, fresh)
            status.update("comparing with the unmerged policy")
            comparison = compare_with_unmerged(policy, fresh, prompt, spec, params, questions)
            facts = written | {"unmerged": comparison} | gather(policy, fresh, history, prompt)
            write_json(fresh / FACTS, facts)
            with atomic_write(fresh / CARD) as file:
                file.write(card(facts))
            for path in fresh.iterdir():  # safetensors makes files that only their owner may read
                path.chmod((fresh / FACTS).stat().st_mode)
    for line in summary_lines(facts, folder):
        console.print(line, soft_wrap=True)


# ---- The folder --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _in_one_line(folder: Path) -> Iterator[None]:
    """Say in one line what the file system or a library refused; `atomic_folder` removes what was written."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: not exported ({first_line(error)}); nothing was left there") from error


def _check_folder(folder: Path, force: bool) -> None:
    """Refuse a folder in which something could be lost, or from which `git add` would take the weights."""
    whole, here = folder.resolve(), Path.cwd().resolve()
    if whole.is_relative_to(here) or here.is_relative_to(whole):
        raise UserError(
            f"{folder}: must lie outside of this project, as a new folder: for example ../looper-dpo"
        )
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: exists and is no folder; name another one")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / FACTS).is_file():
        raise UserError(f"{folder}: is not empty and no earlier export (no {FACTS}); name a new folder")
    if not force:
        raise UserError(f"{folder}: holds an earlier export; --force replaces it")


def _check_weights(policy: str, history: History) -> None:
    """The weights must be those their manifests name, and the adapter must have been trained on this base."""
    for name in dict.fromkeys(("base", trainer_of(policy))):
        step = history.step(name)
        if step is None or step.source != "manifest":
            raise UserError(
                f"{history.made_by[name]}: has no {MANIFEST}, so it was not made by this pipeline; run `dvc repro`"
            )
        for link in broken([step]):
            if link.role == "wrote" or link.path == BASE.as_posix():
                raise UserError(f"export: {link}; `dvc checkout` brings back what was recorded")


def _recorded_settings(policy: str, history: History, params: Params) -> tuple[Prompt, Evaluate]:
    """The prompt the policy was trained for, and how it was evaluated; today's settings where none are recorded."""
    used: dict[str, Any] = params.model_dump(mode="json")
    for manifest in (history.manifest(f"evaluate@{policy}"), history.manifest(trainer_of(policy))):
        used |= manifest.params if manifest else {}
    try:
        return Prompt.model_validate(used["prompt"]), Evaluate.model_validate(used["evaluate"])
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"export: {policy} was made by another version of this project ({key}); run `dvc repro`"
        ) from None


def _remove_left_by_kills(folder: Path) -> None:
    """Remove the unfinished folders of killed exports, which hold gigabytes; a running export keeps its own."""
    for left in folder.absolute().parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        with contextlib.suppress(ValueError, OverflowError, PermissionError):  # no process id; another user's
            try:
                os.kill(int(left.name.split(".")[-2]), 0)
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)


# ---- The model ---------------------------------------------------------------------------------------


def write_model(policy: str, precision: str | None, max_new_tokens: int, fresh: Path) -> dict[str, Any]:
    """Write weights, configs and tokenizer of the merged policy; returns `policy`, `precision` and `parameters`.

    The base is loaded in its own precision where that is the result's too: PEFT adds a 32-bit adapter in 32 bits
    and rounds the sum once. For any other precision the base is loaded in 32 bits, so that rounding happens once too.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from stages.policy.adapter import load_tokenizer
    from stages.policy.request import end_ids

    own = AutoConfig.from_pretrained(BASE, local_files_only=True).dtype or torch.float32
    dtype = getattr(torch, PRECISIONS[precision]) if precision else own
    loaded_in = own if dtype == own else torch.float32
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=loaded_in, local_files_only=True)
    if adapter := adapter_of(policy):
        model = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu").merge_and_unload()
    model = model.to(dtype)
    too_large = next((name for name, one in model.named_parameters() if not one.isfinite().all()), None)
    if too_large:
        raise UserError(f"{too_large}: is too large for {dtype}; choose --precision bf16 or fp32")
    tokenizer = load_tokenizer()
    ends = end_ids(tokenizer, model.generation_config)
    # The base's other settings (penalties, top_k) are left out: the evaluation does not use them.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(fresh, max_shard_size=LARGEST_FILE)
    tokenizer.save_pretrained(fresh)
    short = {name: key for key, name in PRECISIONS.items()}
    return {
        "policy": policy,
        "precision": short[str(dtype).removeprefix("torch.")],
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }


def compare_with_unmerged(
    policy: str, folder: Path, prompt: Prompt, spec: Evaluate, params: Params, count: int
) -> dict[str, Any] | None:
    """Greedy answers and logits of the model in `folder` against the policy it was made from.

    On the first `count` Platinum questions; None without any.
    Logits are compared along the unmerged policy's completions, as many tokens of each as fit into memory.
    The two models are never in memory together.
    """
    import torch

    from stages.engine.load import engine_around
    from stages.policy.adapter import load_policy
    from stages.policy.request import Request
    from stages.text.answers import read_answer

    rows = read_jsonl(PLATINUM, {"id": str, "question": str}) if PLATINUM.is_file() else ()
    problems = list(islice(rows, count))
    if not problems:
        return None
    questions = {one["id"]: one["question"] for one in problems}
    tokens: dict[str, tuple[int, ...]] = {}  # the unmerged policy's completions

    def complete(adapter: Path | None, base: Path) -> dict[str, tuple[str | None, str, Any]]:
        """Answer and text by question id, and the logits along `tokens`."""
        gc.collect()  # the model before this one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        model, tokenizer = load_policy(adapter, base)
        prompts = {name: tuple(prompt_ids(tokenizer, prompt, asked)) for name, asked in questions.items()}
        requests = [Request(name, ids, spec.max_new_tokens) for name, ids in prompts.items()]
        kept = max(1, LOGIT_BYTES // (4 * model.config.vocab_size * len(problems))) - 1
        found = {}
        for one in engine_around(model, tokenizer, params.hardware).generate(requests):
            text = prompt.opening + tokenizer.decode(one.tokens, skip_special_tokens=True)
            before, after = prompts[one.id], tokens.setdefault(one.id, one.tokens)[:kept]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([[*before, *after]], device=model.device)).logits
            logits = logits[0, len(before) - 1 :].float().cpu()
            found[one.id] = read_answer(text, questions[one.id]).answer, text, logits
        return found

    fix_arithmetic(params.hardware.threads, params.seed)
    unmerged = complete(adapter_of(policy), BASE)
    merged = complete(None, folder)
    pairs = [(one, merged[name]) for name, one in unmerged.items()]
    return {
        "questions": len(problems),
        "changed_answers": sum(a[0] != b[0] for a, b in pairs),
        "changed_texts": sum(a[1] != b[1] for a, b in pairs),
        "largest_logit_difference": max(float((a[2] - b[2]).abs().max()) for a, b in pairs),
        "logit_positions": sum(len(a[2]) for a, _ in pairs),
    }


# ---- The facts ---------------------------------------------------------------------------------------


def gather(policy: str, folder: Path, history: History, prompt: Prompt) -> dict[str, Any]:
    """What the model card says of the run, as data; no path of this machine is in it."""
    upto = ("base",) if policy == "base" else tuple(trained_by(policy))
    steps = {step.stage: step for step in reversed(history.steps(upto))}
    model, data = steps["base"].params.get("model") or {}, history.step("prepare")
    test = (data.params.get("data") or {}) if data else {}
    hub = test["platinum"] if test.get("source") == "hub" else {}
    result, comparisons = results(policy, history)
    made_from = [link for name in dict.fromkeys(("base", trainer_of(policy))) for link in steps[name].links]
    parents = {link.path: link.recorded for link in made_from if link.path.endswith(".safetensors")}
    return {
        "base": {key: model.get(key) for key in ("source", "id", "revision")},
        "settings": {
            name: ", ".join(settings(name, public(step.params)))
            for name, step in steps.items()
            if name != "base"
        },
        "test_set": {"source": test.get("source"), "id": hub.get("id"), "split": hub.get("split")},
        "result": result,
        "comparisons": comparisons,
        "prompt": _prompt_facts(prompt, folder),
        "broken": [str(link) for link in broken(list(steps.values()))],
        "files": {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))},
        "parents": dict(sorted(parents.items())),
        "versions": {name: metadata.version(name) for name in ("transformers", "torch", "peft")},
    }


def results(policy: str, history: History) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The policy's Platinum result, and the paired comparisons with the policies before it; None without a result."""
    from stages.stats.paired import compare

    rows = _rows(policy, history)
    if not rows:
        return None, []
    metrics = read_json(PLATINUM_DETAILS / f"{policy}.json")
    result = {key: metrics[key] for key in ("questions", "accuracy", "accuracy_low", "accuracy_high")}
    wanted = ("difference", "difference_low", "difference_high", "p", "gained", "lost", "verdict")
    comparisons = []
    others = load_params().policy_names
    for other in others[: others.index(policy)]:
        if theirs := _rows(other, history):
            found = compare(theirs, rows, shown(other), shown(policy), BOOTSTRAP_SEED)
            comparisons.append({"with": shown(other), **{key: found[key] for key in wanted}})
    return result, comparisons


def _rows(policy: str, history: History) -> list[dict[str, Any]]:
    """The evaluated rows of a policy; none unless its evaluation's manifest names these very weights and files."""
    step = history.step(f"evaluate@{policy}")
    if step is None or step.source != "manifest" or any(link.state != AS_RECORDED for link in step.links):
        return []
    return list(read_jsonl(PLATINUM_EVAL / f"{policy}.jsonl", {"id": str, "correct": bool}))


def public(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters without those that name a place on this machine."""
    return {
        key: public(value) if isinstance(value, dict) else value
        for key, value in params.items()
        if not (key in PRIVATE and isinstance(value, str))
    }


def _prompt_facts(prompt: Prompt, folder: Path) -> dict[str, Any]:
    """The prompt, and in which form it can be sent as text: with the begin token added, as it is, or not at all."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    begin, filled = tokenizer.bos_token, prompt_text(prompt, EXAMPLE)
    ids = prompt_ids(tokenizer, prompt, EXAMPLE)
    forms = {"as it is": filled, "with the begin token": (begin or "") + filled}
    form = next((name for name, text in forms.items() if list(tokenizer(text)["input_ids"]) == ids), None)
    return {
        **{"chat": prompt.chat, "system": prompt.system, "opening": prompt.opening},
        **{"text": prompt.styles[prompt.default], "begin": begin, "as_text": form},
    }


# ---- The model card, and the last words --------------------------------------------------------------


def card(facts: dict[str, Any]) -> str:
    """The model card, Markdown."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown: what is filled in goes through the filters below
    )
    environment.filters |= {
        "md": escape_markdown,
        "code": code,
        "quoted": lambda value: json.dumps(value, ensure_ascii=False),
        "repr": repr,
        "percent": lambda value: f"{100 * value:.1f} %",
        "points": lambda value: f"{100 * value:+.1f}",
    }
    return environment.get_template(TEMPLATE).render(facts, advice=advice(facts), example=EXAMPLE)


def escape_markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    plain = " ".join(str(text).split()).replace("&", "&amp;")
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", plain)


def code(text: str, language: str | None = None) -> str:
    """Text as code, whatever backquotes it holds: within a line, or as a block of a `language`."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    if language is None:
        fence = "`" * (longest + 1)
        edge = " " if longest else ""
        return f"{fence}{edge}{' '.join(text.split())}{edge}{fence}"
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def advice(facts: dict[str, Any]) -> str:
    """What to do where the folder gives other answers than the unmerged policy; nothing where it does not."""
    if not facts["unmerged"] or not facts["unmerged"]["changed_answers"]:
        return ""
    other = "" if facts["precision"] == "fp32" else "take --precision fp32, "
    return (
        "Rounding the weights changed those answers; if that share matters, "
        f"{other}serve the adapter unmerged, or evaluate this folder anew."
    )


def summary_lines(facts: dict[str, Any], folder: Path) -> Iterator[str]:
    """What is printed in the end."""
    found, files = facts["unmerged"], len(facts["files"])
    weights = f"{files} file{'s' * (files > 1)} of weights"
    yield f"{folder}: {facts['policy']} in {facts['precision']}, {facts['parameters']:,} parameters, {weights}"
    if found:
        share = found["changed_answers"] / found["questions"]
        yield (
            f"against the unmerged policy, {found['questions']} platinum questions: {found['changed_answers']} "
            f"greedy answers changed ({share:.0%}), {found['changed_texts']} texts; largest logit difference "
            f"{found['largest_logit_difference']:.3g} over {found['logit_positions']:,} tokens"
        )
        if found["changed_answers"]:
            yield advice(facts)
    else:
        yield "not compared with the unmerged policy"
    if result := facts["result"]:
        low, high = 100 * result["accuracy_low"], 100 * result["accuracy_high"]
        yield f"Platinum: {100 * result['accuracy']:.1f} % ({low:.1f}–{high:.1f}), as evaluated unmerged"
    else:
        yield "Platinum: no evaluation of these weights is here"
    for link in facts["broken"]:
        yield f"WARNING {link}"
    yield f"read {CARD} before you pass it on; it names no licence yet"
