"""The base model from the hub and from folders, with small models in the real ones' file layouts."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants, scan_cache_dir, snapshot_download
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import base
from stages.checkpoint import skeleton, weights
from stages.run.errors import UserError
from tests.checkpoint.hub_server import Hub
from tests.model_files import abel_files, problems, r1_files

REPO = Path(__file__).resolve().parents[2]
ID, REVISION = "GAIR/Abel-7B-002", "38efa25c9af57a27881834994ec34c9ff7f1de3e"
SHARDS = [f"pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3)]
STYLES = {"stepwise": "Question:\n{question}\nAnswer:\n"}
TOKEN = "hf_secretsecretsecret"
# What a repository holds besides what is needed.
OTHERS = {
    "README.md": b"# Abel", ".gitattributes": b"*.bin filter=lfs", "training_args.bin": b"x" * 30_000,
    "modeling_abel.py": b"raise SystemExit('run')", "trainer_state.json": b"{}", "onnx/model.onnx": b"x",
}  # fmt: skip


@pytest.fixture(scope="module")
def abel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in Abel's layout. Read it, never change it."""
    folder = tmp_path_factory.mktemp("abel")
    abel_files(folder, STYLES)
    return folder


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with this project's parameters, profile abel-7b."""
    place = tmp_path / "project"
    shutil.copytree(REPO / "profiles", place / "profiles")
    shutil.copy(REPO / "params.yaml", place)
    monkeypatch.chdir(place)
    text = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text.replace("profile: tiny", "profile: abel-7b"), encoding="utf-8")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return place


@pytest.fixture
def hub(abel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub with Abel's files, and the client told to use it and an empty cache; pieces of it come often."""
    files = {path.name: path.read_bytes() for path in abel.iterdir()}
    server = Hub(ID, REVISION, files | OTHERS)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 16_384)
    client = importlib.import_module("huggingface_hub.file_download")
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=lambda seconds: None))  # before it tries again
    yield server
    server.close()


def use_folder(folder: Path, dtype: str = "bfloat16", **overrides: Any) -> None:
    """Let the profile take the model from a folder."""
    path, yaml = Path("profiles/abel-7b.yaml"), YAML()
    values = yaml.load(path.read_text(encoding="utf-8"))
    values["model"] = {"source": "directory", "dtype": dtype, "overrides": overrides}
    yaml.dump(values, path)
    path = Path("params.yaml")
    values = yaml.load(path.read_text(encoding="utf-8"))
    values["own"]["model"] = str(folder)
    yaml.dump(values, path)


def copy(folder: Path) -> Path:
    """The model in a folder that may be changed, which the profile takes it from."""
    target = Path("../model").resolve()
    shutil.copytree(folder, target)
    use_folder(target)
    return target


def refused(match: str) -> str:
    """The stage ends in one line that has `match`, and leaves no checkpoint; returns the line."""
    with pytest.raises(UserError) as caught:
        base.main()
    line = str(caught.value)
    assert match in line
    assert "\n" not in line
    assert len(line) < 400
    assert not Path("checkpoints/base").exists()
    return line


def start(work: Callable[[], object]) -> int:
    """Do `work` in a copy of this process; returns its id."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # the copy has no threads but this one
            work()
        finally:
            os._exit(1)
    return child


def cache_files(pattern: str) -> list[Path]:
    """Files in the hub's cache."""
    return sorted(Path(constants.HF_HUB_CACHE).rglob(pattern))


def waited_for(look: Callable[[], list[Path]]) -> list[Path]:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + 60
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def original(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the pickle shards, as they were saved."""
    return {name: tensor for file in SHARDS for name, tensor in torch.load(folder / file).items()}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_converted(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """`checkpoints/base` has exactly the folder's weights in the new precision, and transformers loads them."""
    base_files = Path("checkpoints/base")
    found, wanted = saved(base_files), original(folder)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name
    assert {path.suffix for path in base_files.iterdir()} <= {".safetensors", ".json", ".jinja"}
    model, about = AutoModelForCausalLM.from_pretrained(base_files, dtype="auto", output_loading_info=True)
    assert model.dtype == dtype
    assert not any(about.values()), about


# ---- From the hub --------------------------------------------------------------------------------------


def test_the_whole_stage_as_a_process(hub: Hub, abel: Path, tmp_path: Path) -> None:
    """`python -m stages base` with the hub's address in the environment: the weights in bf16, no other file asked."""
    (tmp_path / "project/stages").symlink_to(REPO / "stages")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
    }
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    hub.private_token = TOKEN
    done = subprocess.run(
        [sys.executable, "-m", "stages", "base"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_converted(abel)
    needed = {path.name for path in abel.iterdir()}
    assert hub.asked() == needed
    assert {name: hub.served[name] for name in needed} == {name: len(hub.files[name]) for name in needed}
    # The token goes to the hub and nowhere else: not to the store, not to any file, not to the screen.
    assert {sent for server, _, sent in hub.requests if server == "hub"} == {f"Bearer {TOKEN}"}
    assert {sent for server, _, sent in hub.requests if server == "store"} == {None}
    assert TOKEN not in done.stderr + done.stdout
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_nothing_is_downloaded_twice(hub: Hub, abel: Path) -> None:
    """A second run takes all from the cache, with the hub there and without it, and writes the same bytes."""
    base.main()
    assert_converted(abel)
    # The hub's client finds its cache as it would have left it.
    names = [path.name for path in abel.iterdir()]
    folder = Path(snapshot_download(ID, revision=REVISION, allow_patterns=names, token=False))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: hub.files[name] for name in names
    }
    assert not scan_cache_dir(constants.HF_HUB_CACHE).warnings
    before, manifest = hub.served.copy(), Path("checkpoints/base/manifest.json").read_bytes()
    for hub.down in (False, True):
        shutil.rmtree("checkpoints")
        base.main()
        assert all(hub.served[name] == before[name] == len(hub.files[name]) for name in names)
        assert Path("checkpoints/base/manifest.json").read_bytes() == manifest


def test_a_cut_connection_is_taken_up_again(hub: Hub, abel: Path) -> None:
    """In the same run, from where it broke."""
    hub.cut = {SHARDS[0]: 50_000, SHARDS[2]: 60_000}
    base.main()
    assert_converted(abel)
    assert all(hub.served[name] < len(hub.files[name]) + constants.DOWNLOAD_CHUNK_SIZE for name in SHARDS)


def test_a_hub_that_goes_away_and_comes_back(hub: Hub, abel: Path) -> None:
    """One line says that what came is kept; the next run fetches the rest only."""
    hub.cut, hub.leave = {SHARDS[1]: 50_000}, True
    line = refused(f"the connection broke at {SHARDS[1]}")
    assert "what has come is kept, so run the same command again" in line
    refused("127.0.0.1 cannot be reached (Server disconnected")  # half a cache is not enough
    hub.leave = hub.down = False
    base.main()
    assert_converted(abel)
    assert hub.served[SHARDS[0]] == len(hub.files[SHARDS[0]])
    assert hub.served[SHARDS[1]] < len(hub.files[SHARDS[1]]) + constants.DOWNLOAD_CHUNK_SIZE


def test_a_download_that_is_killed_goes_on(hub: Hub, abel: Path) -> None:
    """SIGKILL while a file comes: the next run asks for what is missing of it."""
    hub.stall = {SHARDS[1]: 50_000}
    child = start(base.main)
    assert hub.stalled.wait(60)
    (part,) = waited_for(
        lambda: [path for path in cache_files("*.incomplete") if path.stat().st_size > 32_000]
    )
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kept = part.stat().st_size
    hub.released.set()
    before = hub.served.copy()
    base.main()
    assert_converted(abel)
    assert hub.served[SHARDS[0]] == before[SHARDS[0]] == len(hub.files[SHARDS[0]])
    assert hub.served[SHARDS[1]] - before[SHARDS[1]] == len(hub.files[SHARDS[1]]) - kept
    assert not cache_files("*.incomplete")


def test_a_first_part_that_is_damaged_is_not_used(
    hub: Hub, abel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A power cut may leave zeros; they are found by the hash, and the file comes whole in the same run."""
    digest = hashlib.sha256(hub.files[SHARDS[2]]).hexdigest()
    part = Path(constants.HF_HUB_CACHE) / f"models--GAIR--Abel-7B-002/blobs/{digest}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(30_000))
    base.main()
    assert_converted(abel)
    assert f"the first part of {SHARDS[2]}, from an earlier run, is damaged" in capsys.readouterr().err


def test_other_bytes_than_announced(hub: Hub, abel: Path) -> None:
    """A file corrupted on the way is named, thrown away, and does not spoil the next run."""
    hub.corrupt = {SHARDS[1]}
    refused(f"{SHARDS[1]} came with other bytes than the hub announced")
    assert not [path for path in cache_files("*.incomplete") if path.stat().st_size]
    hub.corrupt = set()
    base.main()
    assert_converted(abel)
    hub.corrupt = {"config.json"}  # a small one has git's hash
    shutil.rmtree("checkpoints")
    shutil.rmtree(constants.HF_HUB_CACHE)
    refused("config.json came with other bytes than the hub announced")


def test_a_damaged_cache_is_mended(hub: Hub, abel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The damaged file alone is downloaded again; without the hub it is refused."""
    base.main()
    (blob,) = [path.resolve() for path in cache_files(SHARDS[0])]
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    shutil.rmtree("checkpoints")
    hub.down = True
    refused(f"{SHARDS[0]}: is damaged, and the hub cannot be asked for it")
    hub.down = False
    base.main()
    assert_converted(abel)
    assert hub.served[SHARDS[0]] == 2 * len(hub.files[SHARDS[0]])
    assert hub.served[SHARDS[1]] == len(hub.files[SHARDS[1]])
    assert f"{SHARDS[0]} in the hub's cache is damaged; it is downloaded anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "token", "message"),
    [
        ({"revision": "1" * 40}, "", f"model.revision: '{ID}' has no commit {REVISION}"),
        ({"id": "GAIR/Other"}, "", f"'{ID}' is not on 127.0.0.1, or it is private and HF_TOKEN is not set"),
        ({"id": "GAIR/Other"}, TOKEN, f"'{ID}' is not on 127.0.0.1, or HF_TOKEN's owner may not read it"),
        ({"private_token": "hf_x"}, "", "it is private and HF_TOKEN is not set"),
        ({"private_token": "hf_x"}, TOKEN, "127.0.0.1 does not accept the token in HF_TOKEN"),
        ({"gated": True}, "", "wants its terms accepted: do so on its page on the hub, and set HF_TOKEN"),
        ({"gated": True}, TOKEN, "do so on its page on the hub, as the owner of HF_TOKEN"),
        ({"failing": 503}, "", "127.0.0.1 answered with status 503"),
        ({"down": True}, "", "127.0.0.1 cannot be reached (Server disconnected"),
        ({}, f"{TOKEN}\u200b", "HF_TOKEN: holds a space or another character that no token has"),
    ],
)
def test_what_the_hub_refuses_is_said(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], token: str, message: str
) -> None:
    for name, value in settings.items():
        setattr(hub, name, value)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    line = refused(message)
    assert TOKEN not in line
    assert not [name for name in hub.served if name.endswith(".bin")]


def test_no_hub_at_that_address(hub: Hub) -> None:
    hub.close()
    refused("127.0.0.1 cannot be reached (")


def test_something_else_at_that_address(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login page, or a server of another kind."""
    monkeypatch.setattr(Hub, "_listing", lambda self: ["Welcome to the hotel's network"])
    refused("127.0.0.1 does not answer as a hub does")


def test_the_token_of_a_file_is_not_used(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_TOKEN alone counts; what `hf auth login` left on this machine is not sent."""
    (tmp_path / "token").write_text("hf_fromfile")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    base.main()
    assert {sent for _, _, sent in hub.requests} == {None}


def test_a_tag_that_looks_like_a_commit_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = hub._listing()
    monkeypatch.setattr(Hub, "_listing", lambda self: listing | {"sha": "2" * 40})
    refused(f"{REVISION} is not a commit but leads to {'2' * 40}")


def test_wrong_small_files_stop_it_before_the_weights_come(hub: Hub) -> None:
    """A config that does not fit the index is found while 29 GB are still on the hub."""
    layers = b'"num_hidden_layers": '
    hub.files["config.json"] = hub.files["config.json"].replace(layers + b"2", layers + b"3")
    refused("lack 9 of the model's tensors (model.layers.2.input_layernorm.weight the first)")
    assert not [name for name in hub.asked() if name.endswith(".bin")]


def test_a_disk_too_small_stops_it_before_the_weights_come(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Download and conversion together; what is there already is not counted."""
    weight = sum(len(hub.files[name]) for name in SHARDS)
    free = weight + 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    line = refused("are needed on the disk of")
    assert "make room, or set HF_HOME" in line
    assert not [name for name in hub.asked() if name.endswith(".bin")]
    free = int(weight * 1.6)
    base.main()
    assert Path("checkpoints/base").is_dir()


def test_safetensors_are_preferred(hub: Hub, abel: Path) -> None:
    """Where a repository has both, no pickle is asked for."""
    save_file(original(abel), "model.safetensors", metadata={"format": "pt"})
    hub.files["model.safetensors"] = Path("model.safetensors").read_bytes()
    base.main()
    assert_converted(abel)
    assert not [name for name in hub.asked() if name.endswith(".bin")]


def test_another_process_downloads_the_same(hub: Hub) -> None:
    """One at a time writes a file; the second one says so."""
    hub.stall = {SHARDS[0]: 30_000}
    child = start(base.main)
    assert hub.stalled.wait(60)
    os.kill(child, signal.SIGSTOP)
    try:
        Path(".work").rename(".other")  # the other one is another clone's
        refused("another process is downloading it")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ---- From a folder -------------------------------------------------------------------------------------


class Trap:
    """What a malicious checkpoint holds: unpickling it runs code, here code that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def change_shard(
    folder: Path, change: Callable[[dict[str, Any]], None], number: int = 1, **options: Any
) -> Path:
    """Load one pickle shard, let `change` do something to it, save it again; returns its path."""
    shard = folder / SHARDS[number]
    content = torch.load(shard)
    change(content)
    torch.save(content, shard, **options)
    return shard


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_pickle_is_refused(abel: Path, tmp_path: Path, archive: bool) -> None:
    """In torch's format of today and in that of before 1.6: file and code named, nothing run, nothing written."""
    folder, sprung = copy(abel), tmp_path / "sprung"
    shard = change_shard(
        folder, lambda shard: shard.update(trap=Trap(sprung)), _use_new_zipfile_serialization=archive
    )
    line = refused(f"{shard}: holds code (")
    assert "exec), which is never run" in line
    assert not sprung.exists()
    torch.load(shard, weights_only=False)  # the trap is real: a loader that trusts the file springs it
    assert sprung.exists()


def test_code_beside_the_weights_is_neither_run_nor_asked_about(abel: Path, tmp_path: Path) -> None:
    """A config that wants a model class of its own; the question transformers would ask is not asked."""
    folder, sprung = copy(abel), tmp_path / "sprung"
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": classes}))
    for name in ("configuration_own.py", "modeling_own.py"):
        (folder / name).write_text(f"open({str(sprung)!r}, 'w').close()")
    refused(f"{folder}: config.json needs code of its own, which is never run")
    assert not sprung.exists()


def test_an_older_pickle_is_read(abel: Path) -> None:
    """The format of before torch 1.6, which cannot be mapped into memory; here the base stays in 32 bits."""
    folder = copy(abel)
    use_folder(folder, "float32")
    for number in range(3):
        change_shard(folder, lambda shard: None, number, _use_new_zipfile_serialization=False)
    base.main()
    assert_converted(abel, torch.float32)


def break_off(at: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kill this process while piece number `at` is being saved; returns the list in which pieces are noted."""
    saved: list[str] = []

    def save(tensors: Any, path: Path, **options: Any) -> None:
        saved.append(path.name)
        if len(saved) == at:
            path.write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(tensors, path, **options)

    monkeypatch.setattr(weights, "save_file", save)
    return saved


def test_a_killed_conversion_goes_on(abel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the middle of a piece: the pieces before it are kept, and the result has the same bytes."""
    monkeypatch.setattr(weights, "PIECE_BYTES", 30_000)
    use_folder(abel)
    saved = break_off(0, monkeypatch)
    base.main()
    manifest = Path("checkpoints/base/manifest.json").read_bytes()
    pieces = len(saved)
    assert pieces > 6
    assert_converted(abel)
    shutil.rmtree("checkpoints")

    child = start(lambda: (break_off(5, monkeypatch), base.main()))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    finished = sorted(Path(".work/base").glob("*/model-*.safetensors"))
    assert len(finished) == 4
    with finished[1].open("r+b") as file:  # one of them is damaged meanwhile
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    saved.clear()
    base.main()
    assert len(saved) == pieces - 3
    assert Path("checkpoints/base/manifest.json").read_bytes() == manifest
    assert_converted(abel)


def test_pieces_of_a_file_that_was_replaced_are_not_used(abel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights were put into the folder after a run had been cut off."""
    folder = copy(abel)
    child = start(lambda: (break_off(3, monkeypatch), base.main()))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    change_shard(folder, lambda shard: [tensor.mul_(2) for tensor in shard.values()], 0)
    base.main()
    assert_converted(folder)


def test_pieces_are_small_and_divide_all() -> None:
    shapes = {f"t{n}": (n, 10) for n in range(1, 30)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "PIECE_BYTES", 1000)
        expected: Any = SimpleNamespace(own=lambda name: name, written=shapes)
        pieces = weights.divide("file", shapes, expected, torch.bfloat16)
    assert [name for piece in pieces for name in piece.names] == list(shapes)
    for piece in pieces:
        assert piece.bytes == sum(2 * math.prod(shapes[name]) for name in piece.names) <= 1000


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(UP), f"lack 1 of the model's tensors ({UP} the first)"),
        (lambda s: s.update(v_head=torch.ones(3)), "hold 1 that the model does not have (v_head the first)"),
        (
            lambda s: s.update({UP: s[UP][:, :-1].clone()}),
            f"hold 1 of another shape ({UP} the first, [128, 63] instead of [128, 64])",
        ),
        (lambda s: s[UP][0].fill_(math.nan), f"{UP} holds values that are not numbers"),
        (lambda s: s[UP][0, 0].fill_(math.inf), f"{UP} holds values that are not numbers"),
        (lambda s: s.update({UP: s[UP].to(torch.int8)}), f"{UP} is int8; only plain floating-point"),
        (lambda s: s.update(step=7), "step is int, not a tensor"),
        (lambda s: s.update({"lm_head.weight": torch.ones(3)}), "holds lm_head.weight, which another file"),
    ],
    ids=["missing", "extra", "shape", "nan", "inf", "quantized", "no tensor", "twice"],
)
def test_weights_that_do_not_fit_are_refused(
    abel: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = copy(abel)
    number = next(n for n in range(3) if UP in torch.load(folder / SHARDS[n]))
    change_shard(folder, change, number)
    assert str(folder) in refused(message)


def test_what_older_models_saved_beside_the_weights_is_left_out(abel: Path) -> None:
    folder = copy(abel)
    change_shard(folder, lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    base.main()
    assert_converted(abel)


class Liar:
    """A tensor of a million numbers over a memory of three."""

    def __reduce__(self) -> tuple[Any, ...]:
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.ones(3).untyped_storage(), dtype=torch.float32
        )
        rebuild: Any = torch._utils._rebuild_tensor_v2
        return rebuild, (storage, 0, (1_000_000,), (1,), False, OrderedDict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:50_000]), "is damaged"),
        (lambda shard: shard.write_bytes(b""), "is damaged"),
        (lambda shard: shard.write_bytes(b"not found"), "is damaged"),
        (lambda shard: shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
        (lambda shard: torch.save([torch.ones(3)], shard), "holds list, not tensors by name"),
        (lambda shard: shard.unlink(), "No such file"),
        (lambda shard: torch.save({"liar": Liar()}, shard), "is damaged or cut off ("),
    ],
    ids=["cut", "empty", "text", "pointer", "list", "gone", "beyond its memory"],
)
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_damaged_files_are_named(abel: Path, damage: Callable[[Path], None], message: str) -> None:
    shard = copy(abel) / SHARDS[1]
    damage(shard)
    assert str(shard) in refused(message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin.index.json", {"weight_map": {"a": "../outside.bin"}}, "names '../outside.bin'"),
        ("pytorch_model.bin.index.json", {"weight_map": {"a": 3}}, "names 3"),
        ("pytorch_model.bin.index.json", {}, "has no weight_map"),
        ("config.json", {"model_type": "none-such"}, "config.json cannot be read"),
        ("tokenizer.json", {}, "the tokenizer cannot be read"),
        ("pytorch_model.bin.index.json", None, "has no weights that are read here"),
    ],
)
def test_wrong_small_files_are_named(abel: Path, name: str, content: Any, message: str) -> None:
    folder = copy(abel)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(json.dumps(content))
    assert str(folder) in refused(message)


def test_tied_and_shared_tensors(abel: Path) -> None:
    """The output layer is the embedding: written once where the config says so, twice where it does not."""
    folder = copy(abel)
    tensors = original(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # one memory under two names
    for name in [*SHARDS, "pytorch_model.bin.index.json"]:
        (folder / name).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    base.main()
    found = load_file("checkpoints/base/model.safetensors")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    base.main()
    found = load_file("checkpoints/base/model.safetensors")
    assert found.keys() == tensors.keys() - {"lm_head.weight"}
    model = AutoModelForCausalLM.from_pretrained("checkpoints/base")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()

    shutil.rmtree("checkpoints")
    torch.save(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, folder / "pytorch_model.bin")
    refused("lm_head.weight differs from model.embed_tokens.weight, though the config says that they are one")


def test_r1_layout(tmp_path: Path) -> None:
    """bf16 safetensors in two files are taken over as they are."""
    folder = tmp_path / "model"
    folder.mkdir()
    r1_files(folder, STYLES)
    use_folder(folder)
    base.main()
    wanted, found = saved(folder), saved(Path("checkpoints/base"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    shard = folder / "model-00002-of-000002.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    shutil.rmtree("checkpoints")
    assert str(shard) in refused("is damaged or cut off")


@pytest.mark.parametrize("named", ["LlamaTokenizer", "GemmaTokenizer"])
def test_a_sentencepiece_model_alone(abel: Path, named: str) -> None:
    """The tokenizer of `checkpoints/base` divides texts as the sentencepiece model does, or it is refused."""
    folder, model = copy(abel), io.BytesIO()
    texts = [f"{row['question']} {row['answer']}" for row in problems()]
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 3), model_writer=model, vocab_size=380, model_type="bpe", byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    for name in ("tokenizer.json", "added_tokens.json"):
        (folder / name).unlink()
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if named == "GemmaTokenizer":
        refused("GemmaTokenizer divides texts in another way than tokenizer.model does")
        return
    base.main()
    tokenizer = AutoTokenizer.from_pretrained("checkpoints/base", local_files_only=True)
    original = SentencePieceProcessor(model_proto=model.getvalue())
    for text in [*texts, *skeleton.TOKENIZED]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # as the stages call it
        assert ids == original.encode(text)
        assert tokenizer.decode(ids) == text
