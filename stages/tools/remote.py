"""`python -m stages remote check`: is the remote the one you mean, private, and are the artifacts on it whole?

Three things, in this order, and each only if the one before it was right:

1. The configuration: the remote is named in .dvc/config.local and not in the committed .dvc/config, no
   credentials are committed, `verify` is on, and remotes.yaml allows the place. Nothing was sent until here.
2. A probe: a small object of random bytes is written, read back, compared and deleted, by DVC's own file system.
3. The objects of dvc.lock: each one on the remote is read and hashed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import secrets
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from stages.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

ALLOWED = Path("remotes.yaml")
COMMITTED, PRIVATE = Path(".dvc/config"), Path(".dvc/config.local")
DOCS = "docs/private-storage.md"
CREDENTIALS = frozenset(
    "password passphrase access_key_id secret_access_key session_token sse_customer_key token custom_auth_header "
    "connection_string account_key sas_token client_secret oss_key_id oss_key_secret gdrive_client_secret".split()
)
PRIVATE_ACLS = ("private", "bucket-owner-read", "bucket-owner-full-control")
PORTS = {"ssh": 22, "http": 80, "https": 443}
CONNECT_SECONDS = 10  # S3 tries five times
BLOCK = 2**20
SHOWN = 20  # lines of a list


def main(
    name: str | None = None,
    objects: bool = True,
    sample: int | None = None,
    repair: bool = False,
    console: Console | None = None,
) -> None:
    """Check a DVC remote (by default: the default one, or the only one) and print what was found.

    `objects` False leaves the objects of dvc.lock out, `sample` hashes only so many of them, `repair` sends
    missing and corrupt ones again from this machine's cache. Raises UserError for the first thing that is
    wrong, after all of that part were listed.
    """
    from rich.console import Console

    console = console or Console()
    repo = _open_repo()
    name = _choose(repo.config, name)
    remote = _check_configuration(console, repo, name)
    with _said(f"remote '{name}': the probe in {remote.path}"):
        _round_trip(remote.odb)
    _print(console, "a probe written, read back, compared and deleted")
    if objects:
        _check_objects(console, repo, remote, sample, repair)


# ---- The configuration -------------------------------------------------------------------------------


def _open_repo() -> Any:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        return Repo()
    except DvcException as error:
        raise UserError(_first_line(error)) from None


def _choose(config: Any, name: str | None) -> str:
    remotes = sorted(config["remote"])
    if not remotes:
        raise UserError(f"no remote is configured, so nothing can be pushed; name one as in {DOCS}")
    name = (name or config["core"].get("remote") or (remotes[0] if len(remotes) == 1 else "")).lower()
    if not name:
        raise UserError(f"which remote? Name one of {', '.join(remotes)}")
    if name not in remotes:
        raise UserError(f"no remote '{name}'; there are {', '.join(remotes)}")
    return name


def _check_configuration(console: Console, repo: Any, name: str) -> Any:
    """The remote, once all its settings are in order."""
    from dvc.exceptions import DvcException
    from dvc.fs import get_cloud_fs

    try:
        _, settings, _ = get_cloud_fs(repo.config, name=name)
        remote = repo.cloud.get_remote(name)
    except DvcException as error:
        if "dependencies" in str(error):
            raise UserError(
                f"remote '{name}': its packages are not installed; type `pip install -r requirements-remote.txt`"
            ) from None
        raise UserError(f"remote '{name}': {_first_line(error)}") from None
    console.print(
        f"remote '{name}': {_without_password(repo.config['remote'][name]['url'])}",
        style="bold",
        markup=False,
    )
    problems = []
    for what, problem in (
        *committed_problems(repo.config),
        *setting_problems(name, settings),
        *_place(remote, name),
    ):
        _print(console, problem or what, not problem)
        problems += [problem] if problem else []
    if problems:
        raise UserError(problems[0] + (f" (and {len(problems) - 1} more above)" if problems[1:] else ""))
    return remote


def committed_problems(config: Any) -> Iterator[tuple[str, str]]:
    """(what was looked at, what is wrong with it or '') for what git could carry to others."""
    committed, private = config.load_one("repo"), config.load_one("local")
    held = ", ".join(_credentials(committed["remote"]))
    yield (
        f"{COMMITTED}: no credentials",
        held
        and f"{COMMITTED}: holds {held}; replace them where they are issued, for git's history keeps them, "
        f"and set the new ones with `dvc remote modify --local`",
    )
    named = sorted(committed["remote"]) or [committed["core"].get("remote")]
    yield (
        f"{COMMITTED}: no remote",
        f"{COMMITTED}: names the remote '{named[0]}', so that everyone with the repository pushes there; move it "
        f"to {PRIVATE}: `dvc remote remove {named[0]}`, then `dvc remote add --local`"
        if named[0]
        else "",
    )
    yield (
        f"{PRIVATE}: not in git",
        f"{PRIVATE}: git tracks it; type `git rm --cached {PRIVATE}`, and replace the credentials in it"
        if _tracked(PRIVATE)
        else "",
    )
    open_to_others = PRIVATE.exists() and stat.S_IMODE(PRIVATE.stat().st_mode) & 0o077
    if any(_credentials(private["remote"])):
        yield (
            f"{PRIVATE}: only you can read it",
            f"{PRIVATE}: holds credentials and others can read it; type `chmod 600 {PRIVATE}`"
            if open_to_others
            else "",
        )


def setting_problems(name: str, settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what was looked at, what is wrong with it or '') for a remote's own settings."""

    def to_set(key: str, value: str) -> str:
        return f"`dvc remote modify --local {name} {key} {value}`"

    yield (
        "verify: on",
        ""
        if settings.get("verify")
        else f"verify: is off, so a corrupt object would be taken for a good one; type {to_set('verify', 'true')}",
    )
    if settings.get("ssl_verify") is False:
        yield (
            "ssl_verify",
            f"ssl_verify: is off, so any server can pass for the remote; type {to_set('ssl_verify', 'true')}",
        )
    if settings.get("allow_anonymous_login"):
        yield (
            "allow_anonymous_login",
            f"allow_anonymous_login: only a public bucket takes that; type {to_set('allow_anonymous_login', 'false')}",
        )
    if settings.get("acl", "private") not in PRIVATE_ACLS:
        yield (
            "acl",
            f"acl: '{settings['acl']}' lets others read what is pushed; type {to_set('acl', 'private')}",
        )
    for grant in sorted(
        key for key in settings if key.startswith("grant_") and "groups/" in str(settings[key])
    ):
        yield grant, f"{grant}: names a group of strangers; remove it"
    if settings.get("version_aware") or settings.get("worktree"):
        yield (
            "version_aware",
            "version_aware, worktree: such a remote does not keep objects by hash; remove these settings",
        )


def _credentials(remotes: dict[str, dict[str, Any]]) -> Iterator[str]:
    for remote, settings in sorted(remotes.items()):
        yield from (f"{key} of '{remote}'" for key in sorted(CREDENTIALS & settings.keys()))
        if _without_password(str(settings.get("url", ""))) != settings.get("url", ""):
            yield f"a password in the url of '{remote}'"


def _without_password(url: str) -> str:
    return re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", url)


def _tracked(path: Path) -> bool:
    command = ["git", "ls-files", "--error-unmatch", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# ---- The list of allowed places ----------------------------------------------------------------------


def _place(remote: Any, name: str) -> Iterator[tuple[str, str]]:
    """Whether remotes.yaml allows the place where this remote's data really goes."""
    with _said(f"remote '{name}'"):
        settings = remote.fs.fs_args
        if remote.fs.protocol == "ssh":
            # DVC takes any host key; here, only one that known_hosts has. Nor does the host get at the user's agent.
            settings.update(known_hosts=(), agent_forwarding=False, connect_timeout=CONNECT_SECONDS)
        elif remote.fs.protocol == "s3":
            settings.setdefault("config_kwargs", {}).setdefault("connect_timeout", CONNECT_SECONDS)
        kind, address = address_of(remote)
    if kind not in ("ssh", "s3", "folder"):
        yield f"{ALLOWED}", f"remote '{name}': only ssh, s3 and folders can be allowed, this is {kind}"
        return
    allowed = any(_matches(kind, entry, address) for entry in read_allowed()[kind])
    yield (
        f"{ALLOWED}: allows {address}",
        ""
        if allowed
        else f"{ALLOWED}: does not allow {address}; if artifacts may go there, add it under `{kind}:`",
    )
    if kind == "folder" and not Path(address).is_dir():
        yield "the folder is there", f"{address}: there is no such folder; mount it, or make it"


def address_of(remote: Any) -> tuple[str, str]:
    """(kind, address): where the data goes after ssh's configuration, AWS's, and links were followed.

    The address is `host:port`, `https://endpoint/bucket`, or an absolute folder.
    """
    fs = remote.fs
    if fs.protocol == "local":
        return "folder", str(Path(remote.path).resolve())
    if fs.protocol == "ssh":
        import asyncssh

        # `config=()` makes it read ~/.ssh/config, as asyncssh.connect() does.
        given = {name: fs.fs_args[name] for name in ("host", "port", "username") if name in fs.fs_args}
        options = asyncssh.SSHClientConnectionOptions(config=(), **given)
        return "ssh", f"{options.host.lower()}:{options.port}"
    if fs.protocol == "s3":
        return "s3", f"{_origin(fs.fs.s3.meta.endpoint_url)}/{remote.path.strip('/').split('/')[0]}"
    return fs.protocol, remote.path


def read_allowed(path: Path = ALLOWED) -> dict[str, list[str]]:
    """The allowed places of each kind. Without a file nothing is allowed. Raises UserError naming the bad entry."""
    from ruamel.yaml import YAML, YAMLError

    kinds: dict[str, list[str]] = {"ssh": [], "s3": [], "folder": []}
    try:
        found = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return kinds
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold lists under ssh, s3 and folder")
    for kind, entries in found.items():
        if kind not in kinds:
            raise UserError(f"{path}: unknown key '{kind}'; it holds ssh, s3 and folder")
        for entry in entries if isinstance(entries, list) else [entries] if entries is not None else []:
            if problem := _entry_problem(kind, entry):
                raise UserError(f"{path}: {kind}: '{entry}' {problem}")
            kinds[kind].append(entry)
    return kinds


def _entry_problem(kind: str, entry: Any) -> str:
    if not isinstance(entry, str) or not entry.strip() or re.search(r"[*?\s]", entry):
        return "is not one place; patterns are not known here"
    if kind == "folder":
        return (
            ""
            if Path(entry).is_absolute() and entry.strip("/")
            else "must be an absolute folder, and not all of them"
        )
    if kind == "ssh":
        return "must be host or host:port" if re.search(r"[/@]", entry) or not _host(entry) else ""
    if "/" not in entry and ":" not in entry:
        return ""
    url = urlsplit(entry)
    whole = url.scheme in ("http", "https") and url.hostname and re.fullmatch(r"/[^/]+/?", url.path)
    return "" if whole else "must be a bucket, or https://endpoint/bucket"


def _matches(kind: str, entry: str, address: str) -> bool:
    if kind == "folder":
        return Path(address).is_relative_to(Path(entry).resolve())
    if kind == "ssh":
        return _host(entry) == _host(address)
    endpoint, _, bucket = address.rpartition("/")
    if "/" in entry:
        where, _, wanted = entry.rstrip("/").rpartition("/")
        return (_origin(where), wanted) == (endpoint, bucket)
    at_aws = re.fullmatch(r"https://s3([.-][a-z0-9.-]+)?\.amazonaws\.com(\.cn)?", endpoint)
    return entry == bucket and bool(at_aws)


def _host(entry: str) -> tuple[str, int] | None:
    try:
        # An IPv6 address may come without brackets from ssh's configuration.
        bare = re.fullmatch(r"([0-9a-f:]*:[0-9a-f:]*:[0-9a-f:]*):(\d+)", entry)
        url = urlsplit(f"ssh://[{bare[1]}]:{bare[2]}" if bare else f"ssh://{entry}")
        return (url.hostname, url.port or PORTS["ssh"]) if url.hostname else None
    except ValueError:
        return None


def _origin(url: str) -> str:
    """Scheme, host and port of a URL, the port left out where it is the usual one."""
    parts = urlsplit(url)
    port = "" if parts.port in (None, PORTS.get(parts.scheme)) else f":{parts.port}"
    return f"{parts.scheme}://{parts.hostname}{port}"


# ---- The probe ---------------------------------------------------------------------------------------


def _round_trip(odb: Any) -> None:
    """Write an object as a push writes it, read it back, compare, delete."""
    from dvc.fs import localfs

    data = secrets.token_bytes(64 * 1024)
    oid = hashlib.md5(data, usedforsecurity=False).hexdigest()
    path = odb.oid_to_path(oid)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe"
        file.write_bytes(data)
        odb.add(str(file), localfs, oid, check_exists=False, verify=False)
    try:
        with odb.fs.open(path, "rb") as written:
            if written.read() != data:
                raise UserError(f"{path}: what was read back is not what was written")
    finally:
        odb.fs.remove(path)
    if odb.fs.exists(path):
        raise UserError(f"{path}: is still there after it was deleted")


# ---- The objects -------------------------------------------------------------------------------------


@dataclass
class Object:
    """An object that dvc.lock names, directly or through the listing of a folder."""

    oid: str
    name: str  # of an output that it is, or of a file in one
    listings: set[str] = field(default_factory=set)  # the folders' objects that name it
    state: str = "missing"  # or present, whole, corrupt
    size: int = 0  # bytes on the remote


def _check_objects(console: Console, repo: Any, remote: Any, sample: int | None, repair: bool) -> None:
    odb, cache = remote.odb, repo.cache.local
    outs = [out for out in repo.index.outs if out.use_cache and out.remote in (None, remote.name)]
    kept = [str(out) for out in outs if not out.can_push]
    if kept:
        console.print(f"     kept out of pushes: {', '.join(kept)}", markup=False, highlight=False)
    found: dict[str, Object] = {}
    with _said(f"remote '{remote.name}'"):
        for out in outs:
            if out.can_push and out.hash_info and out.hash_info.value:
                _collect(found, odb, cache, out)
        if not found:
            console.print("     dvc.lock names no objects yet; `dvc repro` makes them")
            return
        _hash(console, odb, list(found.values()), sample)
        bad = [one for one in found.values() if one.state in ("missing", "corrupt")]
        if repair and bad:
            repaired = [
                one for one in sorted(bad, key=lambda one: one.oid.endswith(".dir")) if _send(odb, cache, one)
            ]
            _hash(console, odb, repaired, None)
            console.print(f"     sent again: {len(repaired)}")
    _report(console, remote.name, list(found.values()), repair)


def _collect(found: dict[str, Object], odb: Any, cache: Any, out: Any) -> None:
    """Add an output's object, and of a folder those it lists; see which of them are on the remote."""
    oid = out.hash_info.value
    top = found.setdefault(oid, Object(oid, str(out)))
    _look(odb, top)
    if not oid.endswith(".dir"):
        return
    listing = _listing(odb, oid) if top.state == "present" else None
    if top.state == "present":
        top.state = "whole" if listing is not None else "corrupt"
    for entry in listing or _listing(cache, oid) or []:
        one = found.setdefault(entry["md5"], Object(entry["md5"], f"{out}/{entry['relpath']}"))
        one.listings.add(oid)
        _look(odb, one)


def _look(odb: Any, one: Object) -> None:
    with contextlib.suppress(FileNotFoundError):
        one.size = odb.fs.info(odb.oid_to_path(one.oid))["size"]
        one.state = "present"


def _listing(odb: Any, oid: str) -> list[dict[str, str]] | None:
    """What a folder's object lists, or None where it is not there or not what its name says."""
    try:
        with odb.fs.open(odb.oid_to_path(oid), "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return None
    whole = hashlib.md5(text, usedforsecurity=False).hexdigest() == oid.removesuffix(".dir")
    return list(json.loads(text)) if whole else None


def _hash(console: Console, odb: Any, objects: Iterable[Object], sample: int | None) -> None:
    """Read what is present, and see whether it is what its name says."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    chosen = [one for one in objects if one.state == "present"]
    if sample is not None and sample < len(chosen):
        chosen = random.sample(chosen, sample)
    columns = (
        TextColumn("     hashing {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(one.size for one in chosen))
        for one in chosen:
            progress.update(task, description=Path(one.name).name)
            actual = _md5(odb.fs, odb.oid_to_path(one.oid), lambda size: progress.advance(task, size))
            one.state = "whole" if actual == one.oid.removesuffix(".dir") else "corrupt"


def _md5(fs: Any, path: str, advance: Callable[[int], None] = lambda size: None) -> str:
    """The hash by which DVC names an object, of a file of any size."""
    digest = hashlib.md5(usedforsecurity=False)
    with fs.open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _send(odb: Any, cache: Any, one: Object) -> bool:
    """Put an object on the remote from this machine's cache, over what is there; False where it is not here."""
    source = cache.oid_to_path(one.oid)
    if not Path(source).is_file() or _md5(cache.fs, source) != one.oid.removesuffix(".dir"):
        return False
    odb.add(source, cache.fs, one.oid, check_exists=False, verify=False)
    one.state = "present"
    return True


def _report(console: Console, name: str, objects: list[Object], repaired: bool) -> None:
    by_state = {
        state: [one for one in objects if one.state == state]
        for state in ("whole", "present", "missing", "corrupt")
    }
    missing, corrupt = by_state["missing"], by_state["corrupt"]
    counts = f"objects of dvc.lock: {len(by_state['whole'])} whole"
    counts += f", {len(by_state['present'])} there but not hashed" if by_state["present"] else ""
    counts += f", {len(missing)} missing, {len(corrupt)} corrupt"
    _print(console, counts, not (missing or corrupt))
    bad = corrupt + missing
    for one in bad[:SHOWN]:
        console.print(
            f"     {one.state:8} {one.name}  {one.oid}", markup=False, highlight=False, soft_wrap=True
        )
    if bad[SHOWN:]:
        console.print(f"     and {len(bad) - SHOWN} more")
    if not bad:
        return
    whole = {one.oid for one in by_state["whole"]}
    # DVC believes a folder's listing: where that is there, its files are not sent again.
    stuck = corrupt or any(one.listings & whole for one in missing)
    if repaired:
        advice = "this machine's cache lacks them; repeat it on the machine that made them"
    elif stuck:
        advice = f"`dvc push` would not notice; type `python -m stages remote check {name} --repair`"
    else:
        advice = f"type `dvc push -r {name}`"
    said = " and ".join(
        f"{len(some)} {state}" for state, some in (("corrupt", corrupt), ("missing", missing)) if some
    )
    raise UserError(f"remote '{name}': {said} of {len(objects)} objects; {advice}")


# ---- What is said ------------------------------------------------------------------------------------


def _print(console: Console, what: str, good: bool = True) -> None:
    from rich.markup import escape

    mark = "[green]OK[/green]  " if good else "[red]no[/red]  "
    console.print(f"{mark} {escape(what)}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _said(where: str) -> Iterator[None]:
    """Whatever a storage library raises, as one line; their errors share no class of their own."""
    try:
        yield
    except UserError:
        raise
    except TimeoutError:
        raise UserError(f"{where}: no answer") from None
    except Exception as error:
        if type(error).__name__ == "HostKeyNotVerifiable":
            raise UserError(
                f"{where}: the host's key is not in your known_hosts, or is another one now; log in once with `ssh`, "
                f"compare the fingerprint, and try again ({DOCS})"
            ) from None
        raise UserError(f"{where}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
