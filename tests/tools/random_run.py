"""A project with a random small base model, for tests of the tools that load a policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from tokenizers import processors
from transformers import MistralConfig, MistralForCausalLM

from stages.engine.load import engine_around
from stages.policy.adapter import load_policy
from stages.policy.request import Request
from stages.run.params import BuiltModel, load_params
from stages.text.prompts import prompt_ids
from stages.tiny.model import build_tokenizer

SMALL = Path(__file__).resolve().parents[1] / "small"
CHAT = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}model: <think>\n{% endif %}"
)


def make_project(root: Path, prompt: dict[str, Any] | None = None, begins: bool = False) -> Any:
    """The tests' parameters, and a random base with several end tokens; returns the model.

    Its generation settings are ones that the evaluation ignores. With a `prompt` it is a chat model; `begins`: its
    tokenizer puts the begin token in front by itself.
    """
    (root / "profiles").mkdir(parents=True)
    (root / "params.yaml").write_text((SMALL / "params.yaml").read_text())
    profile = YAML(typ="safe").load((SMALL / "profiles" / "small.yaml").read_text())
    profile["prompt"] = prompt or profile["prompt"]
    (root / "profiles" / "small.yaml").write_text(json.dumps(profile))
    spec = load_params(root).model
    assert isinstance(spec, BuiltModel)
    tokenizer = build_tokenizer(spec, [("Ann has 3 bags of 4 apples.", "3*4=12\n#### 12")])
    if prompt:
        tokenizer.chat_template = CHAT
    if begins:
        one = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = one
    torch.manual_seed(4)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer) + 9, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.25, sliding_window=None,
        )
    )  # fmt: skip
    declared = model.generation_config
    declared.eos_token_id, declared.pad_token_id = [2, *range(40, 44)], 0
    declared.repetition_penalty, declared.do_sample, declared.temperature, declared.top_k = 1.9, True, 0.5, 3
    model.save_pretrained(root / "checkpoints" / "base")
    tokenizer.save_pretrained(root / "checkpoints" / "base")
    return model


def greedy(adapter: Path | None, questions: list[str]) -> list[tuple[str, int, str]]:
    """Text, number of tokens and end of each greedy completion, as `evaluate` makes them."""
    params = load_params()
    model, tokenizer = load_policy(adapter)
    requests = [
        Request(str(i), tuple(prompt_ids(tokenizer, params.prompt, question)), params.evaluate.max_new_tokens)
        for i, question in enumerate(questions)
    ]
    found = {one.id: one for one in engine_around(model, tokenizer, params.hardware).generate(requests)}
    return [
        (
            params.prompt.opening + tokenizer.decode(one.tokens, skip_special_tokens=True),
            len(one.tokens),
            one.finish,
        )
        for one in (found[request.id] for request in requests)
    ]
