"""The base model: built on the spot, taken from the hub at a pinned revision, or from a folder.

Whatever it came as, `checkpoints/base/` holds safetensors in one precision, the config, and a tokenizer
whose pad token differs from its end token.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.core.launch import fix_arithmetic
from stages.core.params import BuiltModel, DirectoryModel, HubModel
from stages.core.paths import BASE
from stages.core.stage import StageRun, atomic_folder, stage_run

PAD_CANDIDATES = ("<pad>", "[PAD]", "<|pad|>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>", "<unk>")
CONFIG_FILES = ("*.json", "*.model", "*.jinja", "*.txt")


def main() -> None:
    """Make `checkpoints/base/`."""
    with stage_run("base", sections=("model",), inputs=[], outputs=[BASE]) as run:
        spec = run.params.model
        if isinstance(spec, BuiltModel):
            build(run, spec)
        else:
            source = download(spec) if isinstance(spec, HubModel) else Path(spec.path)
            convert(run, spec, source)


def build(run: StageRun, spec: BuiltModel) -> None:
    """Train the embedded model from scratch."""
    from stages.tiny.model import build_model

    fix_arithmetic(run.params.hardware.threads, spec.seed)
    with run.progress("pre-training", spec.corpus.problems, "problems") as advance:
        network, tokenizer = build_model(spec, advance)
    with atomic_folder(BASE) as folder:
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    run.say(f"built: {sum(p.numel() for p in network.parameters()):,} parameters, {len(tokenizer):,} tokens")


def download(spec: HubModel) -> Path:
    """The hub's files at the pinned revision, in the local hub cache; a download cut off goes on where it was."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = [*CONFIG_FILES, "*.safetensors"]
    try:
        try:
            files = list_repo_files(spec.id, revision=spec.revision)
            if not any(name.endswith(".safetensors") for name in files):
                wanted.append("*.bin")
        except (OSError, HfHubHTTPError):  # no network: whatever the cache holds will do
            wanted.append("*.bin")
        return Path(snapshot_download(spec.id, revision=spec.revision, allow_patterns=wanted))
    except RepositoryNotFoundError:
        raise UserError(
            f"model.id: '{spec.id}' is not on the hub, or it is private and no token is set"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"model.id: '{spec.id}' at revision {spec.revision} cannot be downloaded and is not in the cache "
            f"({str(error).splitlines()[0]:.160}); check the network, or use model.source: directory"
        ) from None


def convert(run: StageRun, spec: HubModel | DirectoryModel, source: Path) -> None:
    """Write `source` as safetensors in the profile's precision. Pickle weights are read without running code."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (source / "config.json").is_file():
        raise UserError(f"{source}: has no config.json; model.path must be a folder laid out as on the hub")
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    for name, value in spec.overrides.items():
        if not hasattr(config, name):
            raise UserError(f"model.overrides.{name}: the model's config has no such setting")
        setattr(config, name, value)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    ensure_pad(tokenizer)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=getattr(torch, spec.dtype),
            local_files_only=True,
            output_loading_info=True,
        )
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"holds code ({code[1]}), which is never run"
            if code
            else "is damaged, or holds more than weights"
        )
        raise UserError(
            f"{source}: a pickle of weights {reason}; take safetensors, or files of another source"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:  # missing, cut off, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: the weights cannot be read ({reason:.200})") from error
    if found["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(
            f"{source}: the weights lack {len(found['missing_keys'])} of the model's tensors "
            f"({min(found['missing_keys'])} the first); get the files anew"
        )
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, more than the model has embeddings for"
        )
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    # The profile says how to decode; what the hub ships for sampling is dropped.
    model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    with atomic_folder(BASE) as folder:
        model.save_pretrained(folder, max_shard_size="4GB")
        tokenizer.save_pretrained(folder)
    run.say(
        f"converted to {spec.dtype} safetensors: {sum(p.numel() for p in model.parameters()):,} parameters"
    )


def ensure_pad(tokenizer: Any) -> None:
    """Give the tokenizer a pad token that is in its vocabulary and is not the end token."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    for name in PAD_CANDIDATES:
        if name in vocabulary and name != tokenizer.eos_token:
            tokenizer.pad_token = name
            return
    raise UserError("the tokenizer has no token that could serve for padding; add one to it and its model")
