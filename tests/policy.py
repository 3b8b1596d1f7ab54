"""Small random policies, in memory and as folders, for tests of engines and of tools that load a policy."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ruamel.yaml import YAML
from tokenizers import processors
from transformers import MistralConfig, MistralForCausalLM

from stages.engine.load import engine_around
from stages.policy.adapter import adapter_config, adapter_weights, load_policy, save_adapter
from stages.policy.request import Completion, Engine, Request, request_seed
from stages.run.params import BuiltModel, load_params
from stages.text.prompts import prompt_ids
from stages.tiny.model import build_tokenizer

SMALL = Path(__file__).resolve().parent / "small"
VOCABULARY, PAD, END = 64, 0, [2, 5, 9, 33]
NEEDS_VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; make test-vllm"
)

CHAT = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}model: <think>\n{% endif %}"
)


def random_base(seed: int, **config: Any) -> Any:
    """A model with random weights, large enough that the next token is far from evenly spread."""
    torch.manual_seed(seed)
    shape = {
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return MistralForCausalLM(MistralConfig(**shape, sliding_window=None, **config))


def make_policy(folder: Path) -> Any:
    """A base and an adapter with random weights, saved in `base` and `adapter` of the folder as the stages do."""
    base = random_base(
        5,
        vocab_size=VOCABULARY,
        hidden_size=128,  # heads of 32, the least that vLLM takes
        max_position_embeddings=256,
        initializer_range=0.125,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    base.save_pretrained(folder / "base")
    spec = load_params(SMALL).model
    assert isinstance(spec, BuiltModel)
    build_tokenizer(spec, [("Ann has 3 apples.", "3")]).save_pretrained(folder / "base")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(base, lora)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    (folder / "adapter").mkdir()
    save_adapter(adapter_weights(policy), adapter_config(policy), folder / "adapter")
    return policy.eval()


def prompts(count: int, seed: int = 1) -> list[tuple[int, ...]]:
    """Random prompts of 3 to 14 tokens."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(10, VOCABULARY) for _ in range(rng.randint(3, 14))) for _ in range(count)]


def mixed_requests() -> list[Request]:
    """Greedy and drawn ones, three to a prompt, with different limits."""
    requests = []
    for number, prompt in enumerate(prompts(20)):
        requests.append(Request(f"{number}/greedy", prompt, 12 + number))
        for k, (temperature, top_p) in enumerate([(0.8, 1.0), (1.3, 0.9)]):
            seed = request_seed(3, str(number), str(k))
            requests.append(Request(f"{number}/{k}", prompt, 30, temperature, top_p, seed))
    return requests


def complete(
    engine: Engine, requests: list[Request], done: frozenset[str] = frozenset()
) -> dict[str, Completion]:
    completions = list(engine.generate(requests, done))
    assert len({one.id for one in completions}) == len(completions)
    return {one.id: one for one in completions}


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
    model = random_base(4, vocab_size=len(tokenizer) + 9, hidden_size=32, initializer_range=0.25)
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
