"""What `check` says of the model before `base` runs, by the code of `base`, and of questions too long for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stages.run.errors import UserError
from stages.run.files import read_json, read_jsonl
from stages.run.params import DirectoryModel, HubModel, Params
from stages.run.paths import CHANGED, PLATINUM, TESTS, TRAIN, VALID
from stages.text.prompts import prompt_text

if TYPE_CHECKING:
    from stages.checkpoint.look import Found
    from stages.policy.context import Asked


def find_model(
    spec: DirectoryModel | HubModel, say: Callable[[str], object]
) -> tuple[Found | None, UserError | None]:
    """The model as `base` will take it, or what it will refuse; neither while the hub's cache lacks a part of it."""
    from stages.checkpoint.hub import Repository
    from stages.checkpoint.look import divide, look
    from stages.checkpoint.source import Folder, Source

    lines: list[str] = []
    source: Source | None = None
    found: Found | None = None
    refused: UserError | None = None
    try:
        if isinstance(spec, DirectoryModel):
            source = Folder(Path(spec.path))
        else:
            source = Repository(spec, say, ask=False)
            if not any(name.endswith((".safetensors", ".bin")) for name in source.names):
                return None, None  # `base` fetches the weights last
        found = look(spec, source, lines.append)
        source.missing_bytes(found.files)  # raises `trouble` when the cache lacks one
        divide(found, source, lines.append)
    except UserError as error:
        if isinstance(spec, HubModel) and (source is None or error is source.trouble):
            return None, None
        found, refused = None, error
    for line in lines:
        say(line)
    return found, refused


def long_questions(params: Params, found: Found | None, base: Path | None) -> Iterator[str]:
    """A line for each file with questions too long for the model: the one `found`, else that in the folder `base`.

    Nothing while `prepare` has not written the questions, or there is no model yet.
    """
    looks = {"sft": params.sft, **params.by_key("dpo")}
    usual: list[Asked] = [(None, None)]
    asked: list[tuple[Path, list[Asked], str, int]] = [
        *(
            (
                TRAIN,
                [(arm.style, arm.system) for arm in spec.arms.values()],
                f"{key}.max_new_tokens",
                spec.max_new_tokens,
            )
            for key, spec in params.by_key("rollout").items()
        ),
        *(
            (VALID, usual, f"{key}.select.max_new_tokens", spec.select.max_new_tokens)
            for key, spec in looks.items()
        ),
        (PLATINUM, usual, "evaluate.max_new_tokens", params.evaluate.max_new_tokens),
        (CHANGED, usual, "evaluate.max_new_tokens", params.evaluate.max_new_tokens),
        (TESTS, usual, "evaluate.max_new_tokens", params.evaluate.max_new_tokens),
    ]
    asked = [one for one in asked if one[0].is_file()]
    if not asked or (found is None and (base is None or not _may_be_long(params, asked, base))):
        return
    from transformers import AutoConfig, AutoTokenizer

    from stages.policy.context import Model, context_size, refuse_long

    config = found.model.config if found else AutoConfig.from_pretrained(base, local_files_only=True)
    tokenizer = found.tokenizer if found else AutoTokenizer.from_pretrained(base, local_files_only=True)
    model = Model(tokenizer, context_size(config), params.prompt)
    for path, ways, key, new in asked:
        try:
            refuse_long(path, read_jsonl(path, {"id": str, "question": str}), ways, model, key, new)
        except UserError as error:
            yield str(error)


def _may_be_long(params: Params, asked: list[tuple[Path, list[Asked], str, int]], base: Path) -> bool:
    """Whether a prompt has more bytes than the context has room for tokens, found without importing transformers."""
    config = read_json(base / "config.json")
    context = config.get("max_position_embeddings") or config.get("n_positions") or 0
    return any(
        params.prompt.chat
        or len(prompt_text(params.prompt, row["question"], style).encode()) + 1 + new > context
        for path, ways, _, new in asked
        for row in read_jsonl(path, {"question": str})
        for style in {style for style, _ in ways}
    )
