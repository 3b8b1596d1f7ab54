"""remote check: the configuration, the allowed places, the words. The servers are in tests/pipeline/test_remotes.py."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo as DvcRepo

from stages.run.errors import UserError
from stages.tools import remote

REPO = Path(__file__).resolve().parents[2]
CORE = (REPO / ".dvc/config").read_text(encoding="utf-8")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DVC project with an allowed folder as its remote, and the folder."""
    root, store = tmp_path / "project", tmp_path / "store"
    (root / ".dvc").mkdir(parents=True)
    store.mkdir()
    subprocess.run(["git", "init", "--quiet", root], check=True)
    monkeypatch.chdir(root)
    for name in [name for name in os.environ if name.startswith(("AWS_", "DVC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    for level in ("GLOBAL", "SYSTEM"):
        monkeypatch.setenv(f"DVC_{level}_CONFIG_DIR", str(tmp_path / level))
    Path(".dvc/config").write_text(CORE)
    configure(url=str(store), verify="true")
    Path("remotes.yaml").write_text(f"folder: [{store}]\n")
    return root


def configure(file: str = ".dvc/config.local", name: str = "private", **settings: str) -> None:
    lines = [f"['remote \"{name}\"']", *(f"    {key} = {value}" for key, value in settings.items())]
    Path(file).write_text((CORE if file == ".dvc/config" else "") + "\n".join(lines) + "\n")


def check(name: str | None = None, **options: bool) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        remote.main(name, **options)
    return stream.getvalue()


def refused(name: str | None = None) -> str:
    with pytest.raises(UserError) as raised:
        check(name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_which_remote(project: Path) -> None:
    """None, one, several, a default, a wrong name, and a folder without DVC."""
    local = Path(".dvc/config.local")
    one = local.read_text()
    assert "OK" in check("private") and "OK" in check("PRIVATE")
    assert refused("other") == "no remote 'other'; there are private"
    local.write_text(one + one.replace("private", "second"))
    assert refused() == "which remote? Name one of private, second"
    local.write_text("[core]\n    remote = second\n" + one + one.replace("private", "second"))
    assert "remote 'second'" in check()
    local.unlink()
    assert refused().startswith("no remote is configured, so nothing can be pushed")
    with contextlib.chdir(project.parent):
        assert "not inside of a DVC repository" in refused()


def test_a_committed_remote(project: Path) -> None:
    """In .dvc/config it is everyone's, whichever it is; so is a committed default."""
    configure(".dvc/config", "shared", url="/mnt/shared")
    assert re.match(
        r"\.dvc/config: names the remote 'shared', .*`dvc remote remove shared`", refused("private")
    )
    Path(".dvc/config").write_text(CORE + "    remote = private\n")
    assert refused().startswith(".dvc/config: names the remote 'private'")


def test_committed_credentials(project: Path) -> None:
    """Told by their names, in any remote; a value is never shown."""
    configure(".dvc/config", "shared", url="s3://weights", access_key_id="AKIA", secret_access_key="hush")
    message = refused("private")
    assert message.startswith(".dvc/config: holds access_key_id of 'shared', secret_access_key of 'shared';")
    assert "(and 1 more above)" in message
    configure(".dvc/config", "shared", url="ssh://me:hush@store/x")
    assert refused("private").startswith(".dvc/config: holds a password in the url of 'shared';")
    configure(url="ssh://me:hush@store/x", verify="true")
    with contextlib.redirect_stdout(io.StringIO()) as stream, pytest.raises(UserError) as raised:
        remote.main()
    assert "hush" not in stream.getvalue() + str(raised.value)


def test_a_private_file_that_is_not(project: Path) -> None:
    """In git; or with credentials, and open to others."""
    path = Path(".dvc/config.local")
    path.chmod(0o644)
    assert "OK" in check()
    path.write_text(path.read_text() + "['remote \"other\"']\n    url = ssh://store/x\n    password = hush\n")
    assert "holds credentials and others can read it; type `chmod 600" in refused("private")
    path.chmod(0o600)
    assert "OK   .dvc/config.local: only you can read it" in check("private")
    subprocess.run(["git", "add", "--force", path], check=True)
    assert "git tracks it; type `git rm --cached .dvc/config.local`" in refused("private")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("verify", "false"),
        ("ssl_verify", "false"),
        ("allow_anonymous_login", "true"),
        ("acl", "public-read"),
        ("grant_read", "uri=http://acs.amazonaws.com/groups/global/AllUsers"),
    ],
)
def test_settings_that_open_it(key: str, value: str) -> None:
    """Each is refused by its name, and a remote without them is not."""
    from dvc.config_schema import SCHEMA

    base = {"url": "s3://weights/x", "verify": "true"}
    settings = SCHEMA["remote"][str]({**base, key: value})
    problems = [problem for good, _, problem in remote.check_settings("private", settings) if not good]
    assert len(problems) == 1 and problems[0].startswith(key)
    kept = SCHEMA["remote"][str]({**base, "acl": "bucket-owner-full-control", "ssl_verify": "/etc/ca.pem"})
    assert all(good for good, _, _ in remote.check_settings("private", kept))


# ---- The allowed places ------------------------------------------------------------------------------


def test_nothing_is_allowed_from_the_start(project: Path) -> None:
    """By the file as it is committed, by an empty one, and without one; the committed examples can be read."""
    committed = (REPO / "remotes.yaml").read_text(encoding="utf-8")
    for text in (committed, "", "folder:\n"):
        Path("remotes.yaml").write_text(text)
        assert re.match(r"remotes\.yaml: does not allow /.*/store; .* add it under `folder:`", refused())
    Path("remotes.yaml").unlink()
    assert refused().startswith("remotes.yaml: does not allow")
    assert list((project.parent / "store").iterdir()) == []
    examples = (line[2:] for line in committed.splitlines() if re.match(r"# (\w+:$|  -)", line))
    Path("remotes.yaml").write_text("\n".join(examples))
    assert [len(entries) for entries in remote.read_allowed().values()] == [1, 2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ssh: [store", "cannot be read"),
        ("- store", "must hold lists under ssh, s3 and folder"),
        ("http: [store]", "unknown key 'http'"),
        ("ssh: ['*.example.org']", "'*.example.org' is not one place"),
        ("ssh: [ssh://store/x]", "must be host or host:port"),
        ("ssh: ['store:port']", "must be host or host:port"),
        ("ssh: [22]", "is not one place"),
        ("ssh: store", "must hold lists under ssh, s3 and folder"),
        ("s3: [minio.example.org/weights]", "must be a bucket, or https://endpoint/bucket"),
        ("s3: ['https://minio.example.org']", "must be a bucket, or https://endpoint/bucket"),
        ("folder: [store]", "must be an absolute folder"),
        ("folder: [/]", "must be an absolute folder"),
    ],
)
def test_a_bad_list_allows_nothing(project: Path, text: str, message: str) -> None:
    Path("remotes.yaml").write_text(text)
    assert refused().startswith("remotes.yaml: ") and message in refused()


@pytest.mark.parametrize(
    ("kind", "entry", "place", "allowed"),
    [
        ("ssh", "store.example.org", "ssh://store.example.org/x", True),
        ("ssh", "Store.Example.org:2222", "ssh://store.example.org:2222/x", True),
        ("ssh", "store.example.org", "ssh://store.example.org:2222/x", False),
        ("ssh", "store.example.org", "ssh://store.example.org.evil.net/x", False),
        ("ssh", "store.example.org", "ssh://evil-store.example.org/x", False),
        ("ssh", "[2001:db8::1]:2222", "ssh://[2001:db8::1]:2222/x", True),
        ("s3", "weights", "https://s3.amazonaws.com", True),
        ("s3", "weights", "https://s3.eu-central-1.amazonaws.com", True),
        ("s3", "https://s3.eu-central-1.amazonaws.com/weights", "https://s3.amazonaws.com", True),
        ("s3", "weights", "http://s3.amazonaws.com", False),
        ("s3", "weights", "https://s3.amazonaws.com.evil.net", False),
        ("s3", "weights", "https://minio.example.org", False),
        ("s3", "weights2", "https://s3.amazonaws.com", False),
        ("s3", "https://minio.example.org/weights", "https://minio.example.org", True),
        ("s3", "https://minio.example.org:443/weights/", "https://minio.example.org", True),
        ("s3", "https://minio.example.org/weights", "http://minio.example.org", False),
        ("s3", "https://minio.example.org/other", "https://minio.example.org", False),
        ("s3", "https://minio.example.org/weights", "https://minio.example.org:9000", False),
        ("folder", "/mnt/looper", "/mnt/looper", True),
        ("folder", "/mnt/looper", "/mnt/looper/a/b", True),
        ("folder", "/mnt/looper", "/mnt/looper2", False),
        ("folder", "/mnt/looper/a", "/mnt/looper", False),
    ],
)
def test_what_an_entry_allows(project: Path, kind: str, entry: str, place: str, allowed: bool) -> None:
    """`place` is the remote's url; of the bucket `weights`, the endpoint."""
    settings = {"url": "s3://weights/x", "endpointurl": place} if kind == "s3" else {"url": place}
    if kind != "folder":
        pytest.importorskip(f"dvc_{kind}", reason=f"dvc-{kind} is not installed")
    configure(verify="true", **settings)
    found = remote.address_of(DvcRepo().cloud.get_remote("private"))
    Path("remotes.yaml").write_text(f"{kind}: ['{entry}']\n")
    assert remote.is_allowed(*found, remote.read_allowed()) is allowed


def test_a_folder_behind_a_link(project: Path) -> None:
    """What counts is where the data goes, also where the list names the link."""
    store = project.parent / "store"
    link = project.parent / "link"
    link.symlink_to(store)
    configure(url=str(link), verify="true")
    assert f"allows {store}" in check()
    outside = project.parent / "outside"
    outside.mkdir()
    (store / "out").symlink_to(outside)
    configure(url=str(store / "out"), verify="true")
    assert f"does not allow {outside}" in refused()
    Path("remotes.yaml").write_text(f"folder: [{link}]\n")
    configure(url=str(store), verify="true")
    assert f"allows {store}" in check()


def test_places_that_cannot_be_used(project: Path) -> None:
    """A folder that is not mounted (DVC would create it, on this machine's own disk), and another scheme."""
    configure(url=str(project.parent / "store/share"), verify="true")
    assert refused().endswith("there is no such folder; mount it, or make it")
    assert not (project.parent / "store/share").exists()
    configure(url="https://example.org/store", verify="true")
    assert refused() == "remote 'private': only ssh, s3 and folders can be allowed, this is https"


def test_ssh_goes_where_its_configuration_says(project: Path) -> None:
    """A name in ~/.ssh/config may stand for any host; the list is asked for that host."""
    pytest.importorskip("dvc_ssh", reason="dvc-ssh is not installed")
    Path("~/.ssh").expanduser().mkdir()
    Path("~/.ssh/config").expanduser().write_text(
        "Host store\n  HostName elsewhere.example.org\n  Port 2222\n"
    )
    Path("remotes.yaml").write_text("ssh: [store]\n")
    configure(url="ssh://store/x", verify="true")
    assert "does not allow elsewhere.example.org:2222;" in refused()


def test_s3_goes_where_its_environment_says(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Amazon's libraries take an endpoint from the environment, too."""
    pytest.importorskip("dvc_s3", reason="dvc-s3 is not installed")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    Path("remotes.yaml").write_text("s3: [weights]\n")
    configure(url="s3://weights/x", verify="true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://elsewhere.example.org")
    assert "does not allow https://elsewhere.example.org/weights;" in refused()
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    configure(url="s3://weights/x", verify="true", region="eu-central-1")
    Path("remotes.yaml").write_text("s3: [others]\n")
    assert "does not allow weights;" in refused()


def test_the_objects_can_be_left_out(project: Path) -> None:
    """By `--no-objects`."""
    assert "dvc.lock names no objects yet" in check()
    assert "dvc.lock" not in check(objects=False)
