"""`python -m stages export --policy dpo DIR`: a policy as one model folder, for whatever serves it.

    python -m stages export --policy dpo ../looper-dpo

The adapter is merged in fp32 (stages/tools/merge.py). Then the folder is loaded as anyone would load it and compared
with the unmerged policy on some questions, because rounding to the chosen precision is not nothing. README.md, the
model card, is made from the run; export.json holds the same facts as data. DIR appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from stages.core.errors import UserError
from stages.core.guard import leave_on_sigterm
from stages.core.launch import fix_arithmetic
from stages.core.params import Evaluate, Params, Prompt, load_params
from stages.core.paths import ADAPTERS, BASE
from stages.core.prompts import prompt_ids, prompt_text
from stages.core.provenance import (
    AS_RECORDED,
    MADE_BY,
    PLATINUM_EVAL,
    PROBLEMS,
    TRAINING,
    History,
    Step,
    broken,
    settings,
)
from stages.core.records import Fields, atomic_write, read_json, read_jsonl, sha256_file, write_json
from stages.core.stage import MANIFEST, atomic_folder
from stages.core.table import POLICIES, samples_of
from stages.tools.ask import check_policy

if TYPE_CHECKING:
    from rich.console import Console

    from stages.tools.merge import Merged

FACTS = "export.json"
CARD = "README.md"
TEMPLATE = "model_card.md.j2"
# Of a base folder, what is not copied: weights are written anew, the rest is about how the base was made.
NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", MANIFEST, "generation_config.json", CARD)
LOGIT_BYTES = 2**31  # of the unmerged policy's logits, kept for the comparison
DETAILS = "metrics/platinum_details"
SEED = 0  # of the bootstraps, as in the report
EXAMPLE = "Ann has 3 bags of 4 apples and eats 2. How many apples are left?"
ROW_FIELDS: Fields = {"id": str, "correct": bool}
# Parameters that name a place on this machine.
PRIVATE = ("path", "train", "platinum", "scorer")


def main(
    folder: Path,
    policy: str = "dpo",
    precision: str | None = None,
    max_shard_size: str = "4GB",
    questions: int = 50,
    force: bool = False,
    console: Console | None = None,
) -> None:
    """Write `policy` into `folder`, in `precision` (None: that of the base), and print how it compares.

    Raises UserError when the folder holds something, or the checkpoints are not what their manifests say.
    """
    params = load_params()
    check_policy("export", policy)
    shard_bytes = _size(max_shard_size)
    _check_folder(folder, force)
    history = History()
    _check_weights(policy, history)
    from rich.console import Console

    console = console or Console(highlight=False)
    from stages.tools.merge import PRECISIONS, merge, precision_of, read_lora, total_bytes, weight_files

    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"--precision: '{precision}' is unknown; choose one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision] if precision else None
    adapter = ADAPTERS[policy]
    lora = read_lora(adapter) if adapter else None
    place = next(one for one in folder.absolute().parents if one.exists())
    need = total_bytes(BASE, dtype)
    if shutil.disk_usage(place).free < need + 2**24:
        free = shutil.disk_usage(place).free
        raise UserError(
            f"{place}: {free / 1e9:.1f} GB are free, the export takes {need / 1e9:.1f} GB; name a folder elsewhere"
        )
    prompt, spec = _asked(params, history, policy)

    _remove_left_by_kills(folder)
    with leave_on_sigterm(), _in_one_line(folder), atomic_folder(folder) as fresh:
        with console.status("merging") as status:
            tensors, done = len(weight_files(BASE)), 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                status.update(f"merging: {done} of {tensors} tensors")

            merged = merge(BASE, lora, fresh, dtype, shard_bytes, advance)
            _copy_rest(fresh, precision, spec)
            status.update("comparing with the unmerged policy")
            comparison = (
                compare_with_unmerged(policy, fresh, params, prompt, spec, questions) if questions else None
            )
        facts = gather(policy, fresh, precision or precision_of(BASE), merged, comparison, history, prompt)
        write_json(fresh / FACTS, facts)
        with atomic_write(fresh / CARD) as file:
            file.write(card(facts))
        for path in fresh.iterdir():  # safetensors makes files that only their owner may read
            path.chmod((fresh / FACTS).stat().st_mode)
    for line in words(facts, folder):
        console.print(line, markup=False, soft_wrap=True)


# ---- the folder --------------------------------------------------------------------------------------


def _check_weights(policy: str, history: History) -> None:
    """The weights must be those their manifests have, and the adapter on the base it was trained on."""
    for name in dict.fromkeys(("base", policy)):
        step = history.step(name)
        if step is None or step.source != "manifest":
            raise UserError(
                f"{MADE_BY[name]}: has no {MANIFEST}, so it was not made by this pipeline; run `dvc repro`"
            )
        for link in broken([step]):
            if link.role == "wrote" or link.path == BASE.as_posix():
                raise UserError(f"export: {link}; `dvc checkout` brings back what was recorded")


def _size(text: str) -> int:
    """Bytes from `500MB` or `4GB`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** (" KMGT".index(found[2].upper()))) if found else 0
    if not size:
        raise UserError(f"--max-shard-size {text}: say it as 500MB or 4GB")
    return size


def _check_folder(folder: Path, force: bool) -> None:
    """Refuse a folder in which something could be lost, before any work."""
    whole = folder.resolve()
    inside = next((out for out in MADE_BY.values() if out.resolve() in (whole, *whole.parents)), None)
    if inside or whole in Path.cwd().resolve().parents or whole == Path.cwd().resolve():
        raise UserError(
            f"{folder}: is {inside or 'where this project lies'}; name a new folder, such as ../looper-dpo"
        )
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: exists and is no folder; name another one")
    try:
        filled = folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); name another folder") from None
    if filled and not (folder / FACTS).is_file():
        raise UserError(f"{folder}: is not empty and no earlier export (no {FACTS}); name a new folder")
    if filled and not force:
        raise UserError(f"{folder}: holds an earlier export; --force replaces it")
    place = next((one for one in whole.parents if one.exists()), whole)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{folder}: cannot be written; check what {place} is, its owner and its disk")


def _remove_left_by_kills(folder: Path) -> None:
    """Remove the unfinished folders of exports that were killed (gigabytes); one that still runs keeps its own."""
    for left in folder.absolute().parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        try:
            os.kill(int(left.name.split(".")[-2]), 0)
        except ProcessLookupError:  # no such process
            shutil.rmtree(left, ignore_errors=True)
        except (ValueError, OverflowError, PermissionError):  # not of an export; another user's
            continue


@contextlib.contextmanager
def _in_one_line(folder: Path) -> Iterator[None]:
    """Say in one line what a file system or library refused; `atomic_folder` has left nothing by then."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: not exported ({reason:.200}); nothing was left there") from error


def _copy_rest(fresh: Path, precision: str | None, spec: Evaluate) -> None:
    """Config, tokenizer and generation settings, without a path of this machine."""
    from transformers import AutoTokenizer, GenerationConfig

    from stages.engine.base import end_ids
    from stages.tools.merge import PRECISIONS

    for path in sorted(BASE.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, fresh / path.name)
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    declared = GenerationConfig.from_pretrained(BASE, local_files_only=True)
    ends = end_ids(tokenizer, declared)
    # What else the base declares (penalties, top_k) was not in the evaluation either.
    GenerationConfig(
        do_sample=False,
        max_new_tokens=spec.max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(fresh)
    config = read_json(fresh / "config.json")
    config.pop("_name_or_path", None)
    if precision:
        config.pop("torch_dtype", None)
        config["dtype"] = str(PRECISIONS[precision]).removeprefix("torch.")
    write_json(fresh / "config.json", config)
    if (fresh / "tokenizer_config.json").is_file():
        options = read_json(fresh / "tokenizer_config.json")
        options.pop("name_or_path", None)
        options["padding_side"] = "left"  # what generation in batches needs
        write_json(fresh / "tokenizer_config.json", options)


# ---- against the unmerged policy ---------------------------------------------------------------------


def compare_with_unmerged(
    policy: str, folder: Path, params: Params, prompt: Prompt, spec: Evaluate, count: int
) -> dict[str, Any] | None:
    """Greedy answers and logits of the model in `folder` against the policy it was made from.

    On the first `count` Platinum questions (validation questions where those are not here); None without any.
    Logits are compared where the unmerged policy wrote its completions, as many tokens of each as memory allows.
    The two models are never in memory together.
    """
    import torch

    from stages.core.answers import read_answer
    from stages.core.policy import load_policy
    from stages.engine.base import Request
    from stages.engine.choose import make_engine

    sources = (PROBLEMS / f"{split}.jsonl" for split in ("platinum", "valid"))
    source = next((path for path in sources if path.is_file()), None)
    if source is None:
        return None
    problems = list(islice(read_jsonl(source, {"id": str, "question": str}), count))
    if not problems:
        return None
    fix_arithmetic(params.hardware.threads, params.seed)

    def answers(model: Any, tokenizer: Any) -> dict[str, tuple[Any, str, tuple[int, ...], tuple[int, ...]]]:
        """Answer, text, prompt and completion by question id."""
        asked = {one["id"]: tuple(prompt_ids(tokenizer, prompt, one["question"])) for one in problems}
        requests = [Request(name, ids, spec.max_new_tokens) for name, ids in asked.items()]
        questions = {one["id"]: one["question"] for one in problems}
        found = {}
        for one in make_engine(model, tokenizer, params.hardware).generate(requests):
            text = prompt.opening + tokenizer.decode(one.tokens, skip_special_tokens=True)
            found[one.id] = read_answer(text, questions[one.id]).answer, text, asked[one.id], one.tokens
        return found

    @torch.inference_mode()
    def logits(model: Any, before: tuple[int, ...], after: tuple[int, ...]) -> Any:
        """Logits at the last prompt token and behind each token of the completion, in fp32 on the CPU."""
        kept = after[: max(1, LOGIT_BYTES // (4 * model.config.vocab_size * len(problems))) - 1]
        ids = torch.tensor([[*before, *kept]], device=model.device)
        return model(input_ids=ids).logits[0, len(before) - 1 :].float().cpu()

    model, tokenizer = load_policy(ADAPTERS[policy])
    unmerged = answers(model, tokenizer)
    kept = {name: logits(model, *one[2:]) for name, one in unmerged.items()}
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model, tokenizer = load_policy(None, folder)
    merged = answers(model, tokenizer)
    differences = [
        float((logits(model, *one[2:]) - kept[name]).abs().max()) for name, one in unmerged.items()
    ]
    return {
        "questions": len(problems),
        "split": source.stem,
        "changed_answers": sum(merged[name][0] != one[0] for name, one in unmerged.items()),
        "changed_texts": sum(merged[name][1] != one[1] for name, one in unmerged.items()),
        "largest_logit_difference": max(differences),
        "logit_positions": sum(len(one) for one in kept.values()),
    }


def _asked(params: Params, history: History, policy: str) -> tuple[Prompt, Evaluate]:
    """The prompt the policy was made for, and how it was evaluated; as now set where nothing is recorded."""
    manifests = [history.manifest(stage) for stage in (policy, f"evaluate@{policy}")]
    used: dict[str, Any] = {}
    for manifest in filter(None, manifests):
        used = {**manifest.params, **used}
    try:
        return (
            Prompt.model_validate(used["prompt"]) if "prompt" in used else params.prompt,
            Evaluate.model_validate(used["evaluate"]) if "evaluate" in used else params.evaluate,
        )
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"export: {policy} was made by another version of this project ({key}); run `dvc repro`"
        ) from None


# ---- what is said of it ------------------------------------------------------------------------------


def gather(
    policy: str,
    folder: Path,
    precision: str,
    merged: Merged,
    comparison: dict[str, Any] | None,
    history: History,
    prompt: Prompt,
) -> dict[str, Any]:
    """Everything the model card says, as data; no path of this machine is in it."""
    upto = {"base": ("base",), "sft": ("sft", "base", "prepare"), "dpo": TRAINING}[policy]
    steps = {step.stage: step for step in reversed(history.steps(upto))}
    result, comparisons, why = results(policy, history)
    made_from = [link for name in dict.fromkeys(("base", policy)) for link in steps[name].links]
    parents = {link.path: link.recorded for link in made_from if link.path.endswith(".safetensors")}
    return {
        "policy": policy,
        "precision": precision,
        "base": base_of(steps["base"].params.get("model") or {}),
        "settings": {
            name: ", ".join(settings(name, public(step.params)))
            for name, step in steps.items()
            if name != "base"
        },
        "test_set": test_set(history),
        "counts": _counts(steps.get("prepare")),
        "result": result,
        "result_why": why,
        "comparisons": comparisons,
        "unmerged": comparison,
        "merge": {**asdict(merged), "rounding": merged.rounding},
        "prompt": _prompt_facts(prompt, folder),
        "broken": [str(link) for link in broken(list(steps.values()))],
        "files": {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))},
        "parents": dict(sorted(parents.items())),
        "versions": {name: metadata.version(name) for name in ("transformers", "torch", "safetensors")},
    }


def results(policy: str, history: History) -> tuple[dict[str, Any] | None, list[dict[str, Any]], str]:
    """The policy's Platinum result, the paired comparisons with earlier policies, and why there is no result.

    Only what was measured on these very weights counts: the evaluation's manifest must name them.
    """
    step = history.step(f"evaluate@{policy}")
    if step is None or step.source != "manifest":
        return None, [], "no evaluation of it is here"
    details = f"{DETAILS}/{policy}.json"
    needed = [link for link in step.links if link.role == "read" or link.path == details]
    if any(link.state != AS_RECORDED for link in needed):
        return None, [], "the evaluation at hand is not of these weights, or was changed"
    metrics, k = read_json(Path(details)), 0
    result = {key: metrics[key] for key in ("questions", "accuracy", "accuracy_low", "accuracy_high")}
    if k := samples_of(metrics):
        spec = step.params["evaluate"]
        result |= {"samples": k, "drawn_at": f"temperature {spec['temperature']:g}, top_p {spec['top_p']:g}"}
        result |= {f"mean{end}": metrics[f"mean_at_{k}{end}"] for end in ("", "_low", "_high")}
    return result, list(_comparisons(policy, step, history)), ""


def _comparisons(policy: str, step: Step, history: History) -> Iterator[dict[str, Any]]:
    """With the policies before it, of the same questions, as far as the rows of both are here."""
    from stages.core.stats import compare

    rows = _rows(policy, step)
    for other in list(ADAPTERS)[: list(ADAPTERS).index(policy)]:
        before = history.step(f"evaluate@{other}")
        theirs = _rows(other, before) if before else []
        asked = [one.link("read", PROBLEMS / "platinum.jsonl") for one in (step, before) if one]
        if rows and theirs and len({link.recorded for link in asked if link}) == 1:
            found = compare(theirs, rows, POLICIES[other], POLICIES[policy], SEED)
            wanted = ("difference", "difference_low", "difference_high", "p", "gained", "lost", "verdict")
            yield {"with": POLICIES[other], **{key: found[key] for key in wanted}}


def _rows(policy: str, step: Step) -> list[dict[str, Any]]:
    """The evaluated rows of a policy, if they are here as recorded."""
    path = PLATINUM_EVAL / f"{policy}.jsonl"
    link = step.link("wrote", path) if step.source == "manifest" else None
    return list(read_jsonl(path, ROW_FIELDS)) if link and link.state == AS_RECORDED else []


def public(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters without those that name a place on this machine."""
    return {
        key: public(value) if isinstance(value, dict) else value
        for key, value in params.items()
        if not (key in PRIVATE and isinstance(value, str))
    }


def base_of(model: dict[str, Any]) -> dict[str, Any]:
    """The base model in words; its id and revision when it is from the hub."""
    if model.get("source") == "hub":
        words = f"{model['id']}, revision {model['revision']}"
        return {
            "id": model["id"],
            "revision": model["revision"],
            "name": model["id"].rpartition("/")[2],
            "words": words,
        }
    names = {
        "build": (
            "Tiny model",
            "a model of about a million parameters, built from scratch on generated problems",
        ),
        "directory": ("Local model", "a model from a folder; name it here"),
    }
    name, words = names.get(model.get("source", ""), ("Model", "not recorded"))
    return {"id": None, "revision": None, "name": name, "words": words}


def test_set(history: History) -> str:
    """What stands for Platinum in this run, in words."""
    step = history.step("prepare")
    data = (step.params.get("data") or {}) if step else {}
    if data.get("source") == "hub":
        return f"{data['platinum']['id']} ({data['platinum']['split']})"
    return {"generated": "Generated problems (in the place of GSM8K Platinum)"}.get(
        data.get("source", ""), "Test set"
    )


def _counts(step: Step | None) -> str:
    """How many questions there were."""
    path = Path("metrics/data.json")
    link = step.link("wrote", path) if step else None
    if not link or link.state != AS_RECORDED:
        return ""
    values = read_json(path)
    return ", ".join(
        f"{values[split]:,} {split}" for split in ("train", "valid", "platinum") if split in values
    )


def _prompt_facts(prompt: Prompt, folder: Path) -> dict[str, Any]:
    """The prompt, and what someone who sends it as text has to know about its begin token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text, begin = prompt.styles[prompt.default], tokenizer.bos_token
    ids, filled = prompt_ids(tokenizer, prompt, EXAMPLE), prompt_text(prompt, EXAMPLE)
    if prompt.chat:
        words = "It is one user's turn in the model's own chat template" + (
            ", after a system line." if prompt.system else "."
        )
        if prompt.opening:
            opening = inline_code(prompt.opening.strip())
            words += f" The template opens the answer with {opening}, which servers leave out."
    elif list(tokenizer(filled)["input_ids"]) == ids:
        words = "As text it can be sent as it is: the tokenizer adds what comes before it."
    elif begin and list(tokenizer(begin + filled)["input_ids"]) == ids:
        words = (
            f"Sent as text, it needs {inline_code(begin)} in front: the tokenizer does not add it by itself."
        )
    else:
        words = "Send it as token ids, made as above: the tokenizer reads the text otherwise."
    return {
        "chat": prompt.chat,
        "text": text,
        "system": prompt.system,
        "opening": prompt.opening,
        "begin": begin,
        "words": words,
    }


def meaning(facts: dict[str, Any]) -> Iterator[str]:
    """What the comparison with the unmerged policy says, in sentences."""
    rounding, found, precision = facts["merge"]["rounding"], facts["unmerged"], facts["precision"]
    if rounding is not None and rounding > 0.001:
        yield f"Rounding the sums to {precision} moves the weights by {rounding:.1%} of what the adapter moved them."
    if not found:
        return
    if found["changed_answers"]:
        cure = (
            "serve the adapter unmerged"
            if precision == "fp32"
            else "take --precision fp32, or serve the adapter unmerged"
        )
        yield f"That answers differ comes from rounding; if the share matters, {cure}, or evaluate this folder anew."
    elif found["changed_texts"]:
        yield "Rounding changed the words of some answers, but not what they answer."
    elif found["largest_logit_difference"]:
        yield "Differences that small are rounding, and changed nothing here."


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
        "code": inline_code,
        "fenced": fenced,
        "quoted": lambda value: json.dumps(value, ensure_ascii=False),
        "percent": lambda value: f"{100 * value:.1f} %",
        "points": lambda value: f"{100 * value:+.1f}",
    }
    how = {"base": "", "sft": ", SFT", "dpo": ", SFT and DPO"}
    made = {
        "base": "The base model of a run of this pipeline, unchanged.",
        "sft": "Fine-tuned (SFT) on worked solutions with a LoRA adapter.",
        "dpo": "Fine-tuned (SFT) on worked solutions, then preference-optimised (DPO) on solutions of its own.",
    }
    prompt, policy = facts["prompt"], facts["policy"]
    shown = {
        **prompt,
        "shown": prompt["text"] if not prompt["system"] else f"{prompt['system']}\n\n{prompt['text']}",
    }
    return environment.get_template(TEMPLATE).render(
        facts
        | {
            "title": facts["base"]["name"] + how[policy],
            "made": made[policy],
            "prompt": shown,
            "code": usage(prompt),
            "meaning": list(meaning(facts)),
            "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        }
    )


def usage(prompt: dict[str, Any]) -> str:
    """Python that asks the exported model one question as the evaluation does."""
    if prompt["chat"]:
        turns = [{"role": "user", "content": prompt["text"]}]
        turns = [{"role": "system", "content": prompt["system"]}, *turns] if prompt["system"] else turns
        ask = (
            f"messages = {turns!r}\n"
            'messages[-1]["content"] = messages[-1]["content"].replace("{question}", question)\n'
            "text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)\n"
        )
    else:
        ask = f'text = {prompt["text"]!r}.replace("{{question}}", question)\n'
    begin = "[tokenizer.bos_token_id, *ids]" if prompt["begin"] and not prompt["chat"] else "ids"
    opening = f"{prompt['opening']!r} + " if prompt["opening"] else ""
    return (
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # where this file lies\n'
        f"question = {EXAMPLE!r}\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")\n'
        'model.to("cuda" if torch.cuda.is_available() else "cpu")\n'
        f"{ask}"
        'ids = tokenizer(text, add_special_tokens=False)["input_ids"]\n'
        f"ids = torch.tensor([{begin}], device=model.device)\n"
        "written = model.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :]\n"
        f"print({opening}tokenizer.decode(written, skip_special_tokens=True))"
    )


def escape_markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    plain = " ".join(str(text).split()).replace("&", "&amp;")
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", plain)


def inline_code(text: str) -> str:
    """Text as code within a line, whatever backquotes it holds."""
    plain = " ".join(str(text).split())
    fence = "`" * (_longest_run(plain) + 1)
    edge = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{edge}{plain}{edge}{fence}"


def fenced(text: str, language: str = "") -> str:
    """Text as a block of code, whatever backquotes it holds."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def words(facts: dict[str, Any], folder: Path) -> Iterator[str]:
    """What is printed in the end."""
    merge, found = facts["merge"], facts["unmerged"]
    files = f"{len(merge['files'])} file{'s' * (len(merge['files']) > 1)}"
    yield f"{folder}: {facts['policy']} in {facts['precision']}, {merge['parameters']:,} parameters, {files} of weights"
    if found:
        share = found["changed_answers"] / found["questions"]
        yield (
            f"against the unmerged policy, {found['questions']} {found['split']} questions: {found['changed_answers']} "
            f"greedy answers changed ({share:.0%}), {found['changed_texts']} texts; largest logit difference "
            f"{found['largest_logit_difference']:.3g} over {found['logit_positions']:,} tokens"
        )
    else:
        yield "not compared with the unmerged policy"
    yield from meaning(facts)
    if result := facts["result"]:
        low, high = 100 * result["accuracy_low"], 100 * result["accuracy_high"]
        yield f"Platinum: {100 * result['accuracy']:.1f} % ({low:.1f}–{high:.1f}), as evaluated unmerged"
    else:
        yield f"Platinum: {facts['result_why']}"
    for link in facts["broken"]:
        yield f"WARNING {link}"
    yield f"read {CARD} before you pass it on; it names no licence yet"
    if _would_be_committed(folder):
        yield f"WARNING {folder} lies in a git repository that does not ignore it: `git add` would take the weights"


def _would_be_committed(folder: Path) -> bool:
    """Whether git would take the folder's files."""
    with contextlib.suppress(OSError):  # no git on this machine
        done = subprocess.run(
            ["git", "check-ignore", "--quiet", FACTS], cwd=folder, capture_output=True, check=False
        )
        return done.returncode == 1  # 0: ignored, 128: no repository
    return False
