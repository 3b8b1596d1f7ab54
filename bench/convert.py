"""Peak memory and time of `base` while it converts a pickle-only checkpoint from fp32 to bf16 safetensors.

    python bench/convert.py                       # 4 shards of 500 MB, and 2 of 3 GB

For each size a random Mistral is written as fp32 pickle shards, and three processes run one after the other: one that
only imports what the stage imports; the stage itself, from the folder; and `from_pretrained(dtype=bfloat16)` with
`save_pretrained`. The weights of the last two are compared. Memory is the most the process had at once (ru_maxrss);
it includes pages of the source file that the kernel may take back when others need room.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, make_workplace, note, print_table
from workplace import change

HIDDEN, FFN, VOCAB = 2048, 5632, 32000
IMPORTS = "import torch, transformers; from transformers import AutoModelForCausalLM, AutoTokenizer"
WHOLE = f"""{IMPORTS}
model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
model.save_pretrained("whole", max_shard_size="4GB")
"""
COMPARE = """
import sys
from pathlib import Path
from safetensors.torch import load_file
one, other = ({k: v for f in Path(p).glob("*.safetensors") for k, v in load_file(f).items()} for p in sys.argv[1:])
assert one.keys() == other.keys() and all(one[k].equal(other[k]) for k in one), "the weights differ"
"""
PEAK = "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"


def write_checkpoint(folder: Path, shards: int, size: int) -> None:
    """A random model in `shards` fp32 pickles of about `size` bytes, with config, index and tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    layer = 4 * (HIDDEN * HIDDEN * 5 // 2 + 3 * HIDDEN * FFN)
    layers = max(1, (shards * size - 8 * HIDDEN * VOCAB) // layer)
    config = MistralConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, vocab_size=VOCAB, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, architectures=["MistralForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in MistralForCausalLM(config).state_dict().items()}
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled > size * len(groups) and len(groups) < shards:
            groups.append([])
        groups[-1].append(name)
        filled += 4 * shape.numel()
    where = {}
    for number, names in enumerate(groups, 1):
        file = f"pytorch_model-{number:05d}-of-{len(groups):05d}.bin"
        torch.save({name: torch.randn(shapes[name]) for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def child(place: Path, *arguments: str) -> str:
    """Run Python in `place`; returns what it printed."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=place, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def measure(shards: int, size: int) -> list[list[str]]:
    """The table's rows for one checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        place = make_workplace(Path(folder) / "place")
        (place / "model").mkdir()
        note(f"writing {shards} shards of {size / 1e9:g} GB")
        # In a process of its own: a child's ru_maxrss begins with what its parent has.
        child(place, __file__, "--write", str(shards), str(size))
        change(place / "params.yaml", ["profile=abel-7b"])
        change(place / "profiles/abel-7b.yaml", ["model={source: directory, path: model, dtype: bfloat16}"])
        rows = []
        commands = {
            "imports alone": ("-c", IMPORTS + PEAK),
            "`base`": (),
            "`from_pretrained`": ("-c", WHOLE + PEAK),
        }
        for title, command in commands.items():
            note(title)
            began = time.monotonic()
            if command:
                memory = int(child(place, *command).split()[-1])
            else:
                child(place, "-m", "stages", "base")
                (facts,) = (place / ".work/runs").glob("*.json")
                memory = json.loads(facts.read_text())["peak_memory_mib"]
            seconds = time.monotonic() - began
            rows.append([f"{shards} × {size / 1e9:g} GB", title, f"{memory:,} MiB", f"{seconds:.0f} s"])
        child(place, "-c", COMPARE, "checkpoints/base", "whole")
        return rows


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["4x500", "2x3000"], help="shards x megabytes of each, as 4x500"
    )
    parser.add_argument("--write", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_checkpoint(Path("model"), *arguments.write)
        return
    rows = []
    for size in arguments.sizes:
        shards, megabytes = map(int, size.split("x"))
        rows += measure(shards, megabytes * 10**6)
    print(f"{machine(1)}\n")
    print_table(["fp32 shards", "process", "peak memory", "time"], rows)


if __name__ == "__main__":
    main()
