"""`python -m stages remote check`: is the remote the one you mean, private, and are the artifacts on it whole?

It checks three things in this order, and each only if the one before it was right:

1. The configuration: the remote is named in .dvc/config.local and not in the committed .dvc/config, no
   credentials are committed, `verify` is on, and remotes.yaml allows the place. Until here nothing was sent.
2. A probe: DVC's own file system writes a small object of random bytes, reads it back, compares and deletes it.
3. The objects of dvc.lock: each one on the remote is read and hashed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import stat
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.text import Text

from stages.run.errors import UserError
from stages.tools.show import at_most, first_line, new_console, raise_first

ALLOWED = Path("remotes.yaml")
COMMITTED, PRIVATE = Path(".dvc/config"), Path(".dvc/config.local")
DOCS = "docs/private-storage.md"
CREDENTIALS = frozenset(
    "password passphrase access_key_id secret_access_key session_token sse_customer_key token custom_auth_header "
    "connection_string account_key sas_token client_secret oss_key_id oss_key_secret gdrive_client_secret".split()
)
PRIVATE_ACLS = ("private", "bucket-owner-read", "bucket-owner-full-control")
AWS = re.compile(r"https://s3([.-][a-z0-9.-]+)?\.amazonaws\.com(\.cn)?")
CONNECT_SECONDS = 10  # S3 tries five times
SHOWN = 20  # lines of a list

Finding = tuple[bool, str, str]  # whether all is well, what to say then, and what to say otherwise


def main(name: str | None = None, objects: bool = True, repair: bool = False) -> None:
    """Check a DVC remote (by default: the default one, or the only one) and print what was found.

    `objects` False leaves out the objects of dvc.lock, `repair` sends missing and corrupt ones again from this
    machine's cache. Raises UserError for the first thing that is wrong, after listing all of that part.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    console = new_console()
    try:
        repo = Repo()
    except DvcException as error:
        raise UserError(first_line(error)) from None
    name = _pick(repo.config, name)
    remote = _check_configuration(console, repo, name)
    with _in_one_line(f"remote '{name}': the probe in {remote.path}"):
        _probe(remote.odb)
    _print(console, "a probe written, read back, compared and deleted")
    if objects:
        with _in_one_line(f"remote '{name}'"):
            _check_objects(console, repo, remote, repair)


# ---- The configuration -------------------------------------------------------------------------------


def _pick(config: Any, name: str | None) -> str:
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
        raise UserError(f"remote '{name}': {first_line(error)}") from None
    url = _without_password(repo.config["remote"][name]["url"])
    console.print(f"remote '{name}': {url}", style="bold")
    with _in_one_line(f"remote '{name}'"):
        findings = (*_committed(repo.config), *check_settings(name, settings), *_place(remote, name))
    for good, fact, problem in findings:
        _print(console, fact if good else problem, good)
    raise_first([problem for good, _, problem in findings if not good])
    return remote


def _committed(config: Any) -> Iterator[Finding]:
    """What git could carry to others."""
    committed, private = config.load_one("repo"), config.load_one("local")
    held = ", ".join(_credentials(committed["remote"]))
    yield (
        not held,
        f"{COMMITTED}: no credentials",
        f"{COMMITTED}: holds {held}; replace them where they are issued, for git's history keeps them, "
        f"and set the new ones with `dvc remote modify --local`",
    )
    named = next(iter(sorted(committed["remote"])), committed["core"].get("remote"))
    yield (
        not named,
        f"{COMMITTED}: no remote",
        f"{COMMITTED}: names the remote '{named}', so that everyone with the repository pushes there; move it "
        f"to {PRIVATE}: `dvc remote remove {named}`, then `dvc remote add --local`",
    )
    asked = ["git", "ls-files", "--error-unmatch", str(PRIVATE)]
    yield (
        subprocess.run(asked, capture_output=True, check=False).returncode != 0,
        f"{PRIVATE}: not in git",
        f"{PRIVATE}: git tracks it; type `git rm --cached {PRIVATE}`, and replace the credentials in it",
    )
    if any(_credentials(private["remote"])):
        yield (
            not stat.S_IMODE(PRIVATE.stat().st_mode) & 0o077,
            f"{PRIVATE}: only you can read it",
            f"{PRIVATE}: holds credentials and others can read it; type `chmod 600 {PRIVATE}`",
        )


def check_settings(name: str, settings: dict[str, Any]) -> Iterator[Finding]:
    """The settings of a remote that can let strangers in, or damage go unseen."""
    modify, acl = f"type `dvc remote modify --local {name}", settings.get("acl", "private")
    why = "is off, so a corrupt object would be taken for a good one"
    yield bool(settings.get("verify")), "verify: on", f"verify: {why}; {modify} verify true`"
    if settings.get("ssl_verify") is False:
        why = "is off, so any server can pass for the remote"
        yield False, "", f"ssl_verify: {why}; {modify} ssl_verify true`"
    if acl not in PRIVATE_ACLS:
        yield False, "", f"acl: '{acl}' lets others read what is pushed; {modify} acl private`"
    if settings.get("allow_anonymous_login"):
        why = "only a public bucket takes that"
        yield False, "", f"allow_anonymous_login: {why}; {modify} --unset allow_anonymous_login`"
    for key, value in settings.items():
        if key.startswith("grant_") and "groups/" in str(value):
            yield False, "", f"{key}: names a group of strangers; {modify} --unset {key}`"


def _credentials(remotes: dict[str, dict[str, Any]]) -> Iterator[str]:
    for remote, settings in sorted(remotes.items()):
        yield from (f"{key} of '{remote}'" for key in sorted(CREDENTIALS & settings.keys()))
        if _without_password(str(settings.get("url", ""))) != settings.get("url", ""):
            yield f"a password in the url of '{remote}'"


def _without_password(url: str) -> str:
    return re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", url)


# ---- The list of allowed places ----------------------------------------------------------------------


def _place(remote: Any, name: str) -> Iterator[Finding]:
    """Whether remotes.yaml allows the place where this remote's data really goes."""
    settings = remote.fs.fs_args
    if remote.fs.protocol == "ssh":
        # DVC accepts any host key; here the host must be in known_hosts. Nor does it get at the user's SSH agent.
        settings.update(known_hosts=(), agent_forwarding=False, connect_timeout=CONNECT_SECONDS)
    elif remote.fs.protocol == "s3":
        settings.setdefault("config_kwargs", {}).setdefault("connect_timeout", CONNECT_SECONDS)
    kind, address = address_of(remote)
    if kind not in ("ssh", "s3", "folder"):
        yield False, "", f"remote '{name}': only ssh, s3 and folders can be allowed, this is {kind}"
        return
    yield (
        is_allowed(kind, address, read_allowed()),
        f"{ALLOWED}: allows {address}",
        f"{ALLOWED}: does not allow {address}; if artifacts may go there, add it under `{kind}:`",
    )
    if kind == "folder" and not Path(address).is_dir():
        yield False, "", f"{address}: there is no such folder; mount it, or make it"


def address_of(remote: Any) -> tuple[str, str]:
    """(kind, address): where the data goes once ssh's and AWS's configuration and links are followed."""
    fs = remote.fs
    if fs.protocol == "local":
        return "folder", str(Path(remote.path).resolve())
    if fs.protocol == "ssh":
        import asyncssh

        # `config=()` makes it read ~/.ssh/config, as asyncssh.connect() does.
        given = {name: fs.fs_args[name] for name in ("host", "port", "username") if name in fs.fs_args}
        options = asyncssh.SSHClientConnectionOptions(config=(), **given)
        return "ssh", f"{options.host.lower().strip('[]')}:{options.port}"
    if fs.protocol == "s3":
        return "s3", _bucket(f"{fs.fs.s3.meta.endpoint_url}/{remote.path.strip('/').split('/')[0]}")
    return fs.protocol, remote.path


def is_allowed(kind: str, address: str, allowed: dict[str, list[str]]) -> bool:
    """Whether an address is on the list; of a folder, whether it is below one that is."""
    if kind == "folder":
        return any(Path(address).is_relative_to(entry) for entry in allowed[kind])
    return address in allowed[kind]


def read_allowed(path: Path = ALLOWED) -> dict[str, list[str]]:
    """The allowed addresses of each kind, written as `address_of` writes them; none without a file.

    Raises UserError naming the bad entry.
    """
    from ruamel.yaml import YAML, YAMLError

    readers = {"ssh": _host, "s3": _bucket, "folder": _folder}
    kinds: dict[str, list[str]] = {kind: [] for kind in readers}
    try:
        found = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return kinds
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    if not isinstance(found, dict) or not all(isinstance(one, list | None) for one in found.values()):
        raise UserError(f"{path}: must hold lists under ssh, s3 and folder")
    for kind, entries in found.items():
        if kind not in kinds:
            raise UserError(f"{path}: unknown key '{kind}'; it holds ssh, s3 and folder")
        for entry in entries or []:
            try:
                if not isinstance(entry, str) or re.search(r"[*?\s]|^$", entry):
                    raise ValueError("is not one place; patterns are not known here")
                kinds[kind].append(readers[kind](entry))
            except ValueError as error:
                raise UserError(f"{path}: {kind}: '{entry}' {error}") from None
    return kinds


def _host(entry: str) -> str:
    """`host:port` of an SSH server."""
    found = re.fullmatch(r"(\[[0-9a-f:]+\]|[^/@:\[\]]+)(?::(\d+))?", entry.lower())
    if not found:
        raise ValueError("must be host or host:port")
    return f"{found[1].strip('[]')}:{found[2] or 22}"


def _bucket(entry: str) -> str:
    """`https://endpoint/bucket`, the usual port left out; of a bucket at AWS only its name."""
    if "/" not in entry and ":" not in entry:
        return entry
    url = urlsplit(entry)
    if url.scheme not in ("http", "https") or not url.hostname or not re.fullmatch(r"/[^/]+/?", url.path):
        raise ValueError("must be a bucket, or https://endpoint/bucket")
    usual = url.port in (None, {"http": 80, "https": 443}[url.scheme])
    endpoint = f"{url.scheme}://{url.hostname}" + ("" if usual else f":{url.port}")
    bucket = url.path.strip("/")
    return bucket if AWS.fullmatch(endpoint) else f"{endpoint}/{bucket}"


def _folder(entry: str) -> str:
    if not Path(entry).is_absolute() or not entry.strip("/"):
        raise ValueError("must be an absolute folder, and not all of them")
    return str(Path(entry).resolve())


# ---- The probe ---------------------------------------------------------------------------------------


def _probe(odb: Any) -> None:
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


def _check_objects(console: Console, repo: Any, remote: Any, repair: bool) -> None:
    """Hash every object that dvc.lock names, and list those that are missing or corrupt."""
    odb, cache = remote.odb, repo.cache.local
    outs = [out for out in repo.index.outs if out.use_cache and out.remote in (None, remote.name)]
    if kept := [str(out) for out in outs if not out.can_push]:
        console.print(f"     kept out of pushes: {', '.join(kept)}")
    names: dict[str, str] = {}  # object -> the output it is, or the file in an output
    for out in outs:
        if out.can_push and out.hash_info and (oid := out.hash_info.value):
            names[oid] = str(out)
            for entry in (_listing(odb, oid) or _listing(cache, oid)) if oid.endswith(".dir") else []:
                names[entry["md5"]] = f"{out}/{entry['relpath']}"
    if not names:
        console.print("     dvc.lock names no objects yet; `dvc repro` makes them")
        return

    states = _inspect(console, odb, names)
    if repair:
        # Files before the listings that name them: DVC takes a listing as a sign that its files are there.
        bad = sorted((oid for oid in names if states[oid] != "whole"), key=lambda oid: oid.endswith(".dir"))
        sent = [oid for oid in bad if _send(odb, cache, oid)]
        states |= _inspect(console, odb, {oid: names[oid] for oid in sent})
        console.print(f"     sent again: {len(sent)}")
    bad = [oid for oid in names if states[oid] != "whole"]
    count = Counter(states.values())
    missing, corrupt = f"{count['missing']} missing", f"{count['corrupt']} corrupt"
    _print(console, f"objects of dvc.lock: {count['whole']} whole, {missing}, {corrupt}", not bad)
    for line in at_most(SHOWN, [f"{states[oid]:8} {names[oid]}  {oid}" for oid in bad]):
        console.print(f"     {line}", soft_wrap=True)
    if bad:
        # `dvc push` goes by names: it sees no corrupt object, and no gap behind a folder's listing.
        advice = (
            "this machine's cache lacks them; repeat it on the machine that made them"
            if repair
            else f"type `dvc push -r {remote.name}`"
            if count["missing"] == len(names)
            else f"`dvc push` may not notice; type `python -m stages remote check {remote.name} --repair`"
        )
        raise UserError(f"remote '{remote.name}': {missing}, {corrupt} of {len(names)} objects; {advice}")


def _listing(odb: Any, oid: str) -> list[dict[str, str]]:
    """What a folder's object lists; nothing where it is missing or not what its name says."""
    if _state(odb, oid) != "whole":
        return []
    with odb.fs.open(odb.oid_to_path(oid), "rb") as file:
        return list(json.load(file))


def _inspect(console: Console, odb: Any, names: dict[str, str]) -> dict[str, str]:
    """Read objects; for each, whether it is whole, corrupt (its bytes are not what its name says) or missing."""
    states = {}
    with console.status("hashing") as status:
        for number, (oid, name) in enumerate(names.items(), 1):
            status.update(Text(f"hashing {number} of {len(names)}: {name}"))
            states[oid] = _state(odb, oid)
    return states


def _state(odb: Any, oid: str) -> str:
    from dvc_data.hashfile.hash import file_md5

    try:
        actual = file_md5(odb.oid_to_path(oid), odb.fs, name="md5")
    except FileNotFoundError:
        return "missing"
    return "whole" if actual == oid.removesuffix(".dir") else "corrupt"


def _send(odb: Any, cache: Any, oid: str) -> bool:
    """Write an object to the remote from this machine's cache, over what is there; False where it is not here."""
    if _state(cache, oid) != "whole":
        return False
    source = cache.oid_to_path(oid)
    odb.add(source, cache.fs, oid, check_exists=False, verify=False)
    return True


# ---- What is printed ---------------------------------------------------------------------------------


def _print(console: Console, what: str, good: bool = True) -> None:
    mark = ("OK   ", "green") if good else ("no   ", "red")
    console.print(Text.assemble(mark, what), soft_wrap=True)


@contextlib.contextmanager
def _in_one_line(where: str) -> Iterator[None]:
    """Say in one line what a storage library raises; their errors have no class in common."""
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
        raise UserError(f"{where}: {first_line(error)}") from None
