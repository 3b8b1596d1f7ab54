"""Downloads a model's files from the hub, at a pinned commit, into the hub's own cache folder.

    repository = Repository(spec, say=print)
    repository.names                                # the files at the repository's top level
    repository.fetch(["config.json"], advance)      # downloads them and checks their hashes

`huggingface_hub` talks to the hub, but its version 2 throws away a half-downloaded file when its process ends. So this
module writes each file itself, to `blobs/<hash>.incomplete` in that cache. After a kill it goes on from there, and it
checks the hash before it uses the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stages.run.errors import UserError
from stages.run.files import sha256_file, sync_folder
from stages.run.guard import NO_ROOM
from stages.run.params import HubModel

ANSWER_SECONDS = 30.0  # how long the hub may take to say what a repository holds
Advance = Callable[[int], object]  # is called with the number of bytes that have just come


@dataclass(frozen=True)
class HubFile:
    """A file as the hub announces it: SHA-256 of a large file, git's SHA-1 of a small one."""

    name: str
    size: int
    digest: str


class Repository:
    """The files of one model at one commit.

    Files that the cache holds are not downloaded again. When the hub cannot be reached, a complete cache is enough.
    Without `ask` there is the cache only.
    Raises UserError when the model or the commit does not exist, or when the network is needed and missing.
    """

    def __init__(self, spec: HubModel, say: Callable[[str], object], ask: bool = True) -> None:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # errors are reported below, in one line each
        self.spec = spec
        self._say = say
        self._token = read_token()
        storage = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(
            repo_id=spec.id, repo_type="model"
        )
        self.folder = storage / "snapshots" / spec.revision
        self._blobs = storage / "blobs"
        self.trouble: UserError | None = None  # why the hub could not be reached
        try:
            if not ask:
                raise UserError(f"model.id: '{spec.id}' is not (whole) in the hub's cache")
            self._files = self._ask()
        except UserError as trouble:
            if not self.folder.is_dir():
                raise
            self.trouble = trouble
            self._files = dict(self._cached())
            if ask:
                say(f"the hub cannot be asked; taking {spec.id} from its cache")

    @property
    def names(self) -> list[str]:
        """The files at the repository's top level."""
        return sorted(self._files)

    def missing_bytes(self, names: Iterable[str]) -> int:
        """Bytes of these files that are not downloaded yet."""
        missing = 0
        for file in map(self._find, names):
            if not (self.folder / file.name).is_file() and not self._blob(file).is_file():
                part = self._part(file)
                missing += max(0, file.size - (part.stat().st_size if part.is_file() else 0))
        return missing

    def fetch(self, names: Iterable[str], advance: Advance) -> None:
        """Download what is missing of these files, so that all of them lie in `folder`. A damaged one is replaced."""
        for file in map(self._find, names):
            place, blob = self.folder / file.name, self._blob(file)
            with self._explained(file.name):
                if not place.is_file() and blob.is_file():  # another revision has the same file
                    link(blob, place)
                if place.is_file() and not intact(place, file):
                    if self.trouble:
                        raise UserError(
                            f"{place}: is damaged, and the hub cannot be asked for it ({self.trouble})"
                        )
                    self._say(f"{file.name} in the hub's cache is damaged; it is downloaded anew")
                    place.unlink()
                    blob.unlink(missing_ok=True)
                if not place.is_file():
                    self._download(file, advance)
                    link(blob, place)

    def _find(self, name: str) -> HubFile:
        if name in self._files:
            return self._files[name]
        raise self.trouble or UserError(
            f"model.id: '{self.spec.id}' at {self.spec.revision} has no file {name}, though its index names it"
        )

    def _ask(self) -> dict[str, HubFile]:
        """Ask the hub which files the repository holds."""
        from huggingface_hub import HfApi

        with self._explained():
            info = HfApi(token=self._token).model_info(
                self.spec.id, revision=self.spec.revision, files_metadata=True, timeout=ANSWER_SECONDS
            )
        if info.sha != self.spec.revision:  # a tag may look like a commit's hash
            raise UserError(
                f"model.revision: {self.spec.revision} is not a commit but leads to {info.sha}; use that"
            )
        files = {}
        for one in info.siblings or []:
            size, digest = (one.lfs.size, one.lfs.sha256) if one.lfs else (one.size, one.blob_id)
            # Names and hashes become file names here, so only plain ones are accepted.
            if "/" in one.rfilename or one.rfilename.startswith(".") or size is None:
                continue
            if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest or ""):
                files[one.rfilename] = HubFile(one.rfilename, size, digest)
        return files

    def _cached(self) -> Iterator[tuple[str, HubFile]]:
        """The files in the cache. The cache stores the content under its hash, and links to it by name."""
        for place in self.folder.iterdir():
            if place.is_file():
                # Only one step of the link is followed: the blob may itself be a link to a file with another name.
                digest = place.readlink().name if place.is_symlink() else ""
                yield place.name, HubFile(place.name, place.stat().st_size, digest)

    def _blob(self, file: HubFile) -> Path:
        return self._blobs / file.digest

    def _part(self, file: HubFile) -> Path:
        return self._blobs / f"{file.digest}.incomplete"

    def _download(self, file: HubFile, advance: Advance) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.spec.id, file.name, revision=self.spec.revision)
        # A compressed download could not be resumed. When the hub redirects to another host, the client does not send
        # the token there.
        headers = {**build_hf_headers(token=self._token), "Accept-Encoding": "identity"}
        part = self._part(file)
        self._blobs.mkdir(parents=True, exist_ok=True)
        with _Counted(part, advance) as out:
            while True:
                done = out.seek(0, os.SEEK_END)
                if done > file.size:
                    done = out.truncate(0)
                http_get(url, out, resume_size=done, headers=dict(headers), expected_size=file.size)
                out.flush()
                os.fsync(out.fileno())
                if intact(part, file):
                    break
                out.truncate(0)
                if not done:
                    raise UserError(
                        f"model.id: '{self.spec.id}': {file.name} came with other bytes than the hub announced; it was "
                        "removed. Try again; if it stays so, look at what stands between this machine and the hub"
                    )
                # What was there from an earlier run was damaged, by a power cut for example.
                self._say(
                    f"the first part of {file.name}, from an earlier run, is damaged; it is downloaded whole"
                )
            part.replace(self._blob(file))
        sync_folder(self._blobs)

    @contextlib.contextmanager
    def _explained(self, name: str = "") -> Iterator[None]:
        """Turn an error of the hub, the network or the disk into one line. No URL is shown: it may hold a signature."""
        import httpx2
        from huggingface_hub import constants, errors

        what = f"model.id: '{self.spec.id}'"
        host = urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
        sent = "HF_TOKEN's owner may not read it" if self._token else "it is private and HF_TOKEN is not set"
        again = "what has come is kept, so run the same command again" if name else "check the network"
        owner = "as the owner of HF_TOKEN" if self._token else "and set HF_TOKEN to a token of yours"
        known = {
            errors.RevisionNotFoundError: f"model.revision: '{self.spec.id}' has no commit {self.spec.revision}; see "
            "its page on the hub",
            errors.GatedRepoError: f"{what} wants its terms accepted: do so on its page on the hub, {owner}",
            errors.RepositoryNotFoundError: f"{what} is not on {host}, or {sent}",
            errors.HFValidationError: f"{what} is not a name that a model on the hub can have",
            errors.OfflineModeIsEnabled: f"{what} is not (whole) in the hub's cache, and HF_HUB_OFFLINE forbids to "
            "download it",
        }
        try:
            yield
        except tuple(known) as error:
            message = next(words for kind, words in known.items() if isinstance(error, kind))
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status == 401 and self._token:
                message = f"{what}: {host} does not accept the token in HF_TOKEN; make a new one, or unset it"
            else:
                message = (
                    f"{what}: {host} answered with status {status}{f' for {name}' if name else ''}; try later"
                )
        except httpx2.TransportError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            message = f"{what}: {f'the connection broke at {name}' if name else f'{host} cannot be reached'}"
            message += f" ({reason:.120}); {again}, or use model.source: directory"
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, TypeError, KeyError) as error:
            message = (
                f"{what}: {host} does not answer as a hub does ({type(error).__name__}); check HF_ENDPOINT"
            )
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            if error.errno is None:  # the hub's client has no class of its own for a wrong length
                message = f"{what}: {name} came with another length than announced; {again}"
            else:
                place = error.filename or self._blobs
                message = f"{place}: cannot be written ({error.strerror}); check its owner, or set HF_HOME"
        else:
            return
        raise UserError(message)


class _Counted(io.BufferedWriter):
    """A file that one process at a time appends to, and that reports how many bytes were written."""

    def __init__(self, path: Path, advance: Advance) -> None:
        super().__init__(io.FileIO(path, "a"))
        self._advance = advance
        try:
            fcntl.flock(self, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise UserError(f"{path}: another process is downloading it; wait for it, or end it") from None

    def write(self, data: Any) -> int:
        count = super().write(data)
        self._advance(count)
        return count


def read_token() -> str | bool:
    """The token in HF_TOKEN. False keeps the client from sending one that it finds elsewhere."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", token):  # the client's own error message would print the token
        raise UserError("HF_TOKEN: holds a space or another character that no token has; set it again")
    return token or False


def intact(path: Path, file: HubFile) -> bool:
    """Whether a file has the size and the hash that the hub announced. Files copied out of a cache have no hash."""
    if path.stat().st_size != file.size:
        return False
    if re.fullmatch(r"[0-9a-f]{64}", file.digest):
        return sha256_file(path) == file.digest
    if re.fullmatch(r"[0-9a-f]{40}", file.digest):  # git's hash covers the type and the size as well
        return hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes()).hexdigest() == file.digest
    return True


def link(blob: Path, place: Path) -> None:
    """Link `place` to `blob`, as the hub's own client does."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(os.path.relpath(blob, place.parent))
