"""Private storage against real servers on this machine: OpenSSH, an S3 server, and a folder.

A small DVC project (this one's DVC settings, three stages that take no time) is pushed, cloned elsewhere, pulled,
damaged and repaired; one test does it with the small pipeline run. The S3 server (moto) needs an environment of its
own, .venv/s3-server, which `make test` makes; sshd is Debian's openssh-server.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pwd
import re
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

REPO = Path(__file__).resolve().parents[2]
SSHD = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
S3_SERVER = Path(sys.prefix) / "s3-server" / "bin" / "moto_server"
BIG = 3_000_000  # bytes of the small project's largest file
PIPELINE = f"""
stages:
  base:
    cmd: mkdir -p base && yes 0123456789 | head -c {BIG} > base/weights && echo tiny > base/config
    outs:
      - base
  sft:
    cmd: mkdir -p sft && wc -c base/weights > sft/adapter && echo two > sft/tokenizer
    deps:
      - base
    outs:
      - sft
  pairs:
    cmd: cat sft/adapter sft/adapter > pairs.jsonl
    deps:
      - sft/adapter
    outs:
      - pairs.jsonl
"""


# ---- Servers -----------------------------------------------------------------------------------------


class Relay(socketserver.ThreadingTCPServer):
    """Passes connections on to a server; told to stall, it swallows what a client sends after so many bytes."""

    allow_reuse_address, daemon_threads = True, True

    def __init__(self, server: int) -> None:
        self.server, self.limit, self.passed = server, None, 0  # type: ignore[var-annotated]
        self.stalled = threading.Event()
        super().__init__(("127.0.0.1", 0), self.Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def stall_after(self, limit: int | None) -> None:
        """Stop passing on after `limit` more bytes from clients; None: never again."""
        self.limit, self.passed = limit, 0
        self.stalled.clear()

    class Handler(socketserver.BaseRequestHandler):
        server: Relay

        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", self.server.server)) as upstream:
                ends = {self.request: upstream, upstream: self.request}
                for end in ends:
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with contextlib.suppress(OSError):
                    while True:
                        for source in select.select(list(ends), [], [])[0]:
                            data = source.recv(65536)
                            if not data:
                                return
                            if source is self.request:
                                self.server.passed += len(data)
                                if self.server.limit is not None and self.server.passed > self.server.limit:
                                    self.server.stalled.set()
                                    continue
                            ends[source].sendall(data)


@dataclass
class Store:
    """A place to push to."""

    kind: str
    url: str  # a new folder in it is appended
    settings: dict[str, str]
    allowed: str  # as it stands in remotes.yaml
    environment: dict[str, str] = field(default_factory=dict)
    relay: Relay | None = None
    folder: Path | None = None  # where the objects lie, or
    s3: Any = None  # who knows them

    def objects(self, place: str) -> dict[str, bytes]:
        """Every file below `place`, by what follows files/md5."""
        if self.folder:
            root = self.folder / place / "files" / "md5"
            files = (path for path in root.rglob("*") if path.is_file())
            return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
        listed = self.s3.list_objects_v2(Bucket="weights", Prefix=f"{place}/").get("Contents", [])
        found = {one["Key"]: self.s3.get_object(Bucket="weights", Key=one["Key"]) for one in listed}
        return {key.removeprefix(f"{place}/files/md5/"): one["Body"].read() for key, one in found.items()}

    def damage(self, place: str, name: str, data: bytes | None) -> None:
        """Replace an object's bytes, as a failing disk would; None removes it."""
        if not self.folder:
            key = {"Bucket": "weights", "Key": f"{place}/files/md5/{name}"}
            self.s3.delete_object(**key) if data is None else self.s3.put_object(**key, Body=data)
            return
        path = self.folder / place / "files" / "md5" / name
        mode = path.stat().st_mode
        path.unlink()
        if data is not None:
            path.write_bytes(data)
            path.chmod(mode)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with keys of its own."""
    folder = tmp_path_factory.mktemp("home")
    (folder / ".ssh").mkdir(mode=0o700)
    return folder


@pytest.fixture(scope="module")
def ssh(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """OpenSSH's server, started by whoever runs the tests; its key may do nothing but SFTP."""
    if not SSHD or not shutil.which("ssh-keygen"):
        pytest.skip("no sshd on this machine: `apt-get install openssh-server`")
    if not importlib.util.find_spec("dvc_ssh"):
        pytest.skip("dvc-ssh is not installed: `pip install -r requirements-remote.txt`")
    folder = tmp_path_factory.mktemp("sshd")
    for key in (folder / "host_key", folder / "other_key", home / ".ssh" / "store_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key], check=True)
    public = (home / ".ssh" / "store_key.pub").read_text()
    (folder / "authorized_keys").write_text(f'restrict,port-forwarding,command="internal-sftp" {public}')
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd asks for it when it runs as root
    for _ in range(5):  # another process may take the port that was free
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {
            "ListenAddress": f"127.0.0.1:{port}", "HostKey": folder / "host_key", "PidFile": "none",
            "AuthorizedKeysFile": folder / "authorized_keys", "StrictModes": "no", "UsePAM": "no",
            "PasswordAuthentication": "no", "KbdInteractiveAuthentication": "no", "Subsystem": "sftp internal-sftp",
        }  # fmt: skip
        (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
        with (folder / "log").open("w") as log:
            server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
        while server.poll() is None and "listening" not in (folder / "log").read_text():
            time.sleep(0.02)
        if server.poll() is None:
            break
    else:
        pytest.fail(f"sshd does not start: {(folder / 'log').read_text()}")
    relay = Relay(port)
    (folder / "store").mkdir()
    yield Store(
        "ssh",
        f"ssh://{pwd.getpwuid(os.geteuid()).pw_name}@127.0.0.1:{relay.port}{folder}/store",
        {"keyfile": str(home / ".ssh" / "store_key")},
        f"ssh: ['127.0.0.1:{relay.port}']",
        relay=relay,
        folder=folder / "store",
    )
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """An S3 server with one bucket."""
    if not S3_SERVER.exists():
        pytest.skip(f"no {S3_SERVER}: `make test` installs it")
    if not importlib.util.find_spec("dvc_s3"):
        pytest.skip("dvc-s3 is not installed: `pip install -r requirements-remote.txt`")
    import botocore.session

    log = tmp_path_factory.mktemp("s3") / "log"
    with log.open("w") as out:
        server = subprocess.Popen([S3_SERVER, "-H", "127.0.0.1", "-p", "0"], stdout=out, stderr=out)
    while not (found := re.search(r"Running on http://127\.0\.0\.1:(\d+)", log.read_text())):
        assert server.poll() is None, log.read_text()
        time.sleep(0.05)
    relay = Relay(int(found[1]))
    endpoint, key = f"http://127.0.0.1:{relay.port}", "testing"
    client = botocore.session.Session().create_client(
        "s3", region_name="us-east-1", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=key
    )
    client.create_bucket(Bucket="weights")
    yield Store(
        "s3",
        "s3://weights",
        {"endpointurl": endpoint, "region": "us-east-1"},
        f"s3: ['{endpoint}/weights']",
        {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": key},
        relay=relay,
        s3=client,
    )
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A folder, as a mounted share is one."""
    root = tmp_path_factory.mktemp("mounted")
    return Store("folder", str(root), {}, f"folder: ['{root}']", folder=root)


@pytest.fixture(scope="module", params=["ssh", "s3", "folder"])
def store(request: pytest.FixtureRequest) -> Store:
    return request.getfixturevalue(request.param)


# ---- The small project -------------------------------------------------------------------------------


@dataclass
class Small:
    """A clone of the small project, and the environment of its user."""

    root: Path
    environment: dict[str, str]

    def run(self, *command: str, fails: bool = False) -> str:
        """What a command printed; the test fails unless it ended as it should."""
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode != 0) == fails, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def dvc(self, *arguments: str, fails: bool = False) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments, fails=fails)

    def clone(self, root: Path) -> Small:
        """A fresh clone elsewhere, with the owner's .dvc/config.local."""
        self.run("git", "clone", "--quiet", str(self.root), str(root))
        shutil.copy2(self.root / ".dvc/config.local", root / ".dvc/config.local")
        return Small(root, self.environment | {"DVC_SITE_CACHE_DIR": str(root / ".dvc/tmp/site")})

    def use(self, store: Store, place: str) -> None:
        """Name the remote `private`, and allow it."""
        settings = {"url": f"{store.url}/{place}", "verify": "true", **store.settings}
        lines = "".join(f"    {name} = {value}\n" for name, value in settings.items())
        (self.root / ".dvc/config.local").write_text(f"['remote \"private\"']\n{lines}")
        (self.root / "remotes.yaml").write_text(store.allowed)
        if store.kind == "folder":
            (Path(store.url) / place).mkdir()
        self.environment = self.environment | store.environment

    def check(self, *options: str) -> str:
        """What `python -m stages remote check` prints; its error line last."""
        command = [sys.executable, "-m", "stages", "remote", "check", *options]
        environment = self.environment | {"PYTHONPATH": str(REPO)}
        done = subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def original(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The small project after one run, committed; nothing is pushed."""
    root = tmp_path_factory.mktemp("original") / "project"
    (root / ".dvc").mkdir(parents=True)
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore"):
        shutil.copy2(REPO / name, root / name)
    (root / "dvc.yaml").write_text(PIPELINE)
    foreign = ("DVC_", "AWS_", "SSH_", "GIT_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    roles = [f"GIT_{role}_{what}" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")]
    own = {"HOME": str(home), "DVC_SITE_CACHE_DIR": str(root / ".dvc/tmp/site")}
    project = Small(root, inherited | dict.fromkeys(roles, "tests@localhost") | own)
    project.run("git", "init", "--quiet")
    project.dvc("repro", "--quiet")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message", "run")
    return project


@pytest.fixture
def project(original: Small, tmp_path: Path) -> Small:
    """A copy of it that a test may change."""
    shutil.copytree(original.root, tmp_path / "project", symlinks=True)
    site = str(tmp_path / "project/.dvc/tmp/site")
    return Small(tmp_path / "project", original.environment | {"DVC_SITE_CACHE_DIR": site})


@pytest.fixture
def trusted(ssh: Store, home: Path) -> Iterator[Path]:
    """known_hosts with the server's key."""
    known = home / ".ssh/known_hosts"
    _know(ssh, known, "host_key")
    yield known
    known.unlink()


def _know(ssh: Store, known: Path, key: str) -> None:
    assert ssh.relay and ssh.folder
    public = (ssh.folder.parent / f"{key}.pub").read_text()
    known.write_text(f"[127.0.0.1]:{ssh.relay.port} {public}")


@pytest.fixture
def reachable(store: Store, request: pytest.FixtureRequest) -> Store:
    """The store; SSH's with its host key known."""
    if store.kind == "ssh":
        request.getfixturevalue("trusted")
    return store


def whole(objects: dict[str, bytes]) -> bool:
    """Whether every object has the hash that it is named by."""
    return all(
        hashlib.md5(data).hexdigest() == name.replace("/", "").removesuffix(".dir")
        for name, data in objects.items()
    )


# ---- The tests ---------------------------------------------------------------------------------------


def test_there_and_back(reachable: Store, project: Small, tmp_path: Path) -> None:
    """Push, a fresh clone elsewhere, pull: nothing is out of date, and nothing runs."""
    project.use(reachable, "there-and-back")
    assert "7 missing, 0 corrupt of 7 objects; type `dvc push -r private`\n" in project.check()
    assert reachable.objects("there-and-back") == {}  # not even the probe is left
    assert "7 files pushed" in project.dvc("push", "-r", "private")
    assert len(reachable.objects("there-and-back")) == 7
    assert "7 whole, 0 missing, 0 corrupt" in project.check()
    assert len(reachable.objects("there-and-back")) == 7
    elsewhere = project.clone(tmp_path / "elsewhere")
    elsewhere.dvc("pull", "-r", "private")
    assert "Running stage" not in elsewhere.dvc("repro")
    assert elsewhere.run("git", "status", "--short") == ""
    for name in ("base/weights", "sft/adapter", "pairs.jsonl"):
        assert (elsewhere.root / name).read_bytes() == (project.root / name).read_bytes()


def test_push_killed_and_repeated(reachable: Store, project: Small) -> None:
    """Killed in the middle of an object: none has its name before it is whole, and the next push sends the rest."""
    project.use(reachable, "killed")
    if reachable.relay:
        reachable.relay.stall_after(BIG // 3)
    command = [sys.executable, "-m", "dvc", "push", "-q", "-r", "private"]
    push = subprocess.Popen(command, cwd=project.root, env=project.environment)
    if reachable.relay:
        assert reachable.relay.stalled.wait(60)
    mounted = None if reachable.relay else reachable.folder
    while mounted and push.poll() is None and not any(one.is_file() for one in mounted.rglob("killed/**/*")):
        time.sleep(0.001)  # a file with a passing name may be gone before it could be read
    push.kill()
    assert push.wait() == -signal.SIGKILL or not reachable.relay
    if reachable.relay:
        reachable.relay.stall_after(None)
    left = {name: data for name, data in reachable.objects("killed").items() if not name.endswith(".tmp")}
    assert whole(left)
    if reachable.relay:
        assert max(map(len, left.values()), default=0) < BIG
    project.dvc("push", "-q", "-r", "private")
    assert "7 whole, 0 missing, 0 corrupt" in project.check()
    after = {name: data for name, data in reachable.objects("killed").items() if not name.endswith(".tmp")}
    assert len(after) == 7 and whole(after)


def test_a_corrupt_object_is_refused(reachable: Store, project: Small, tmp_path: Path) -> None:
    """Pull does not take it, `remote check` names it, push would leave it, and `--repair` puts it right."""
    project.use(reachable, "corrupt")
    project.dvc("push", "-q", "-r", "private")
    (name,) = [name for name, data in reachable.objects("corrupt").items() if len(data) == BIG]
    data = bytearray(reachable.objects("corrupt")[name])
    data[BIG // 2] ^= 1
    reachable.damage("corrupt", name, bytes(data))
    elsewhere = project.clone(tmp_path / "elsewhere")
    refused = elsewhere.dvc("pull", "-r", "private", fails=True)
    assert "failed to pull data from the cloud" in refused and "\nbase\n" in refused
    assert not (elsewhere.root / "base/weights").exists()
    assert (elsewhere.root / "sft/adapter").is_file()
    found = project.check()
    assert re.search(rf"corrupt +base/weights +{name.replace('/', '')}", found)
    assert "`python -m stages remote check private --repair`" in found
    shutil.copy2(project.root / "remotes.yaml", elsewhere.root)
    assert "this machine's cache lacks them" in elsewhere.check("--repair")
    assert "7 whole, 0 missing, 0 corrupt" in project.check("--repair")
    elsewhere.dvc("pull", "-r", "private")
    assert (elsewhere.root / "base/weights").read_bytes() == (project.root / "base/weights").read_bytes()


def test_a_missing_file_of_a_folder(folder: Store, project: Small) -> None:
    """DVC believes a folder's listing and would not send it again; a corrupt listing is found, too."""
    project.use(folder, "missing")
    project.dvc("push", "-q", "-r", "private")
    objects = folder.objects("missing")
    (name,) = [name for name, data in objects.items() if len(data) == BIG]
    folder.damage("missing", name, None)
    advice = "`dvc push` may not notice; type `python -m stages remote check private --repair`"
    assert advice in project.check()
    for listing in (name for name in objects if name.endswith(".dir")):
        folder.damage("missing", listing, b"[]")
    found = project.check()
    assert "4 whole, 1 missing, 2 corrupt" in found
    assert re.search(r"corrupt +base ", found)
    assert "sent again: 3" in project.check("--repair")
    assert folder.objects("missing") == objects


def test_base_kept_out_of_pushes(folder: Store, project: Small, tmp_path: Path) -> None:
    """`push: false`: a clone lacks the base alone, can go without it, and builds it again."""
    file = project.root / "dvc.yaml"
    file.write_text(file.read_text().replace("- base\n  sft", "- base:\n          push: false\n  sft"))
    project.use(folder, "kept-out")
    assert "Running stage" not in project.dvc("repro")  # the setting alone reruns nothing
    project.run("git", "commit", "--quiet", "--all", "--message", "push: false")
    project.dvc("push", "-q", "-r", "private")
    assert all(len(data) < BIG for data in folder.objects("kept-out").values())
    found = project.check()
    assert "kept out of pushes: base\n" in found and "4 whole, 0 missing, 0 corrupt" in found
    elsewhere = project.clone(tmp_path / "elsewhere")
    assert "\nbase\n" in elsewhere.dvc("pull", "-r", "private", fails=True)
    assert (elsewhere.root / "pairs.jsonl").is_file()
    assert "Running stage" not in elsewhere.dvc("repro", "--allow-missing")
    assert elsewhere.dvc("repro", "base").count("Running stage") == 1
    assert "Running stage" not in elsewhere.dvc("repro")
    assert elsewhere.run("git", "status", "--short") == ""


def test_an_unknown_host(ssh: Store, project: Small, home: Path, trusted: Path) -> None:
    """DVC takes any host key; `remote check` takes the one that known_hosts has, and sends nothing to another."""
    project.use(ssh, "host")
    assert "7 missing" in project.check()
    _know(ssh, trusted, "other_key")
    found = project.check()
    assert "the host's key is not in your known_hosts, or is another one now" in found
    assert ssh.objects("host") == {}


def test_through_ssh_itself(ssh: Store, project: Small, home: Path, trusted: Path) -> None:
    """With ssh as DVC's way to the host (docs/private-storage.md), a push to a host of another key fails."""
    assert ssh.relay
    port = ssh.relay.port
    config = home / ".ssh/config"
    config.write_text(
        f"Host store-checked\n  HostName 127.0.0.1\n  Port {port}\n"
        f"  ProxyCommand ssh -F {config} -o UserKnownHostsFile={trusted} -i {home}/.ssh/store_key"
        f" -o BatchMode=yes -W localhost:{port} -p {port} 127.0.0.1\n"
    )
    project.use(ssh, "proxy")
    local = project.root / ".dvc/config.local"
    local.write_text(local.read_text().replace(f"127.0.0.1:{port}", "store-checked"))
    project.dvc("push", "-q", "-r", "private")
    assert "7 whole, 0 missing, 0 corrupt" in project.check()
    local.write_text(local.read_text().replace("/proxy", "/other"))
    _know(ssh, trusted, "other_key")
    project.dvc("push", "-q", "-r", "private", fails=True)
    assert ssh.objects("other") == {}
    config.unlink()


@pytest.mark.pipeline
def test_the_pipeline_there_and_back(
    ssh: Store, copy_run: Callable[[], Project], tmp_path: Path, home: Path
) -> None:
    """The real stages' outputs by SSH to a fresh clone: `dvc status` is clean, `dvc repro` runs nothing."""
    here = copy_run()
    project = Small(here.root, here.environment | {"LOOPBACK_ALLOWED": "1", "HOME": str(home)})
    project.use(ssh, "pipeline")
    project.dvc("push", "-q", "-r", "private")
    elsewhere = project.clone(tmp_path / "elsewhere")
    elsewhere.dvc("pull", "-q", "-r", "private")
    assert "up to date" in elsewhere.dvc("status")
    assert "Running stage" not in elsewhere.dvc("repro")
    assert elsewhere.run("git", "status", "--short") == ""
