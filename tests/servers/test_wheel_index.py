"""Wheels in a channel: published, served as a simple index, and installed from there by the real uv and pip."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urljoin

import httpx
import pytest
from click.testing import CliRunner
from lab import ROOT, Lab, environment, serving

from ssm_forge.base.errors import IntegrityError, NetworkError, UsageError
from ssm_forge.base.files import sha256_of
from ssm_forge.build.make_wheel import make
from ssm_forge.channel import folder as channels
from ssm_forge.channel import simple_index as index
from ssm_forge.channel import statement as trust
from ssm_forge.channel import wheel_upkeep as upkeep
from ssm_forge.channel.source import open_source
from ssm_forge.commands.channel import channel as channel_command
from ssm_forge.package import read_wheel as read
from ssm_forge.publish.wheels import publish, select
from ssm_forge.serve.tokens import TokenStore
from wheel_packages import kernels, tiny_wheel

PAGE = "cu130-torch211"
JSON = {"Accept": "application/vnd.pypi.simple.v1+json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels of both projects for torch 2.11, of one for torch 2.7, and torches that are only names."""
    folder = tmp_path_factory.mktemp("made")
    pins = ("causal-conv1d ==1.7.0",)
    return {
        "conv": make(kernels(folder, "causal-conv1d", version="1.7.0"), folder / "wheels"),
        "mamba": make(kernels(folder, depends=pins), folder / "wheels"),
        "other": make(kernels(folder / "other", torch="2.7", build="bridge_cuda126_*"), folder / "wheels"),
        **{name: tiny_wheel(folder / "torches", "torch", name) for name in ("2.11.1", "2.7.0")},
    }


def send(made: dict[str, Path], *names: str, to: str) -> list[str]:
    paths = [made[name] for name in names]
    return [done.outcome for done in publish(paths, to, statements=lambda wheel: b"", log=lambda line: None)]


@pytest.fixture(scope="module")
def filled(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A server with these wheels, for tests that change nothing."""
    folder = tmp_path_factory.mktemp("filled")
    (folder / "home").mkdir()
    send(made, "conv", "mamba", "other", to=str(folder / "channel"))
    store = TokenStore(folder / "tokens.json")
    token = store.add("reader", "read", 1)
    with serving(folder / "channel", store, folder / "home") as server:
        yield Lab(folder / "channel", server, store, token, "", folder / "home")


@pytest.fixture
def reading(filled: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """The same, with our own client logged in."""
    filled.login(filled.read, monkeypatch)
    return filled


def with_token(lab: Lab, path: str) -> str:
    """An address as users give it to pip and uv: the token is the password."""
    return f"{lab.url.replace('://', f'://any:{lab.read}@')}/{path}"


def test_a_page_lists_what_installers_need_in_the_form_they_ask_for(filled: Lab, made: dict[str, Path]) -> None:
    url = f"{filled.url}/simple/{PAGE}/mamba-ssm/"
    with httpx.Client(auth=("any", filled.read)) as client:
        answer = client.get(url, headers=JSON)
        assert answer.headers["content-type"] == JSON["Accept"]
        page = answer.json()
        (entry,) = page["files"]
        assert (page["name"], page["meta"], page["versions"]) == (
            "mamba-ssm",
            {"api-version": "1.1"},
            ["2.3.2.post1+cu130torch2.11"],
        )
        assert entry["filename"] == made["mamba"].name
        assert entry["hashes"] == {"sha256": sha256_of(made["mamba"])}
        assert (entry["size"], entry["requires-python"]) == (made["mamba"].stat().st_size, ">=3.9")
        wheel = client.get(urljoin(url, entry["url"]))
        assert wheel.content == made["mamba"].read_bytes()
        metadata = client.get(urljoin(url, entry["url"]) + ".metadata").content
        assert hashlib.sha256(metadata).hexdigest() == entry["core-metadata"]["sha256"]
        assert metadata == read.inspect(made["mamba"]).metadata
        text = client.get(url)
        assert text.headers["content-type"].startswith("text/html")
        (link,) = re.findall(r'<a href="([^"]+)" ([^>]*)>([^<]+)</a>', text.text)
        assert link[0] == f"../{quote(made['mamba'].name)}#sha256={sha256_of(made['mamba'])}"
        assert 'data-requires-python="&gt;=3.9"' in link[1]
        assert f'data-core-metadata="sha256={entry["core-metadata"]["sha256"]}"' in link[1]
        names = [p["name"] for p in client.get(f"{filled.url}/simple/{PAGE}/", headers=JSON).json()["projects"]]
        assert names == ["causal-conv1d", "mamba-ssm"]


FORMS = {
    "": "text/html",
    "*/*": "text/html",
    "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.01": "json",
    "text/html, application/vnd.pypi.simple.v1+json;q=0.5": "text/html",
    "application/vnd.pypi.simple.latest+json": "json",
    "application/vnd.pypi.simple.v1+html": "v1+html",
}


def test_the_form_of_a_page_is_the_one_that_is_liked_best(filled: Lab) -> None:
    for accept, kind in FORMS.items():
        url = f"{filled.url}/simple/{PAGE}/mamba-ssm/"
        answer = httpx.get(url, auth=("any", filled.read), headers={"Accept": accept})
        assert kind in answer.headers["content-type"], accept
        assert answer.headers["vary"] == "Accept"


def test_an_unchanged_page_is_not_sent_again_and_a_changed_one_is(lab: Lab, made: dict[str, Path]) -> None:
    send(made, "conv", to=lab.url)
    with httpx.Client(auth=("any", lab.read), headers=JSON) as client:
        url = f"{lab.url}/simple/{PAGE}/"
        before = client.get(url)
        assert before.headers["cache-control"] == "private, no-cache"
        assert client.get(url, headers={"If-None-Match": before.headers["etag"]}).status_code == 304
        send(made, "mamba", to=lab.url)
        assert client.get(url, headers={"If-None-Match": before.headers["etag"]}).status_code == 200


def test_nothing_is_shown_without_a_token(filled: Lab, made: dict[str, Path]) -> None:
    name = quote(made["mamba"].name)
    for path in ("", f"{PAGE}/", f"{PAGE}/mamba-ssm/", f"{PAGE}/{name}", f"{PAGE}/{name}.metadata", "cu999-torch99/"):
        answer = httpx.get(f"{filled.url}/simple/{path}")
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"].startswith("Basic ")
        assert "needs a token" in answer.text
        assert httpx.get(f"{filled.url}/simple/{path}", auth=("any", "wrong")).status_code == 401
    assert httpx.get(f"{filled.url}/t/{filled.read}/simple/{PAGE}/mamba-ssm/").status_code == 200
    refused = httpx.put(f"{filled.url}/simple/{PAGE}/{name}", auth=("any", filled.read), content=b"")
    assert refused.status_code == 403
    assert "may read, but not write" in refused.text


def test_what_is_no_part_of_the_index_is_not_there(filled: Lab) -> None:
    for path in ("cu130/", "..%2f/", f"{PAGE}/..%2f..%2f.lock", f"{PAGE}/Mamba_ssm/", f"{PAGE}/x/", f"{PAGE}/a.whl"):
        answer = httpx.get(f"{filled.url}/simple/{path}", auth=("any", filled.read))
        assert answer.status_code == 404, path


def test_two_torches_never_share_a_page(filled: Lab, made: dict[str, Path]) -> None:
    for page, name in ((PAGE, "mamba"), ("cu126-torch27", "other")):
        (entry,) = index.entries(filled.channel, page, "mamba-ssm").values()
        assert entry["filename"] == made[name].name
    with httpx.Client(auth=("any", filled.read)) as client:
        assert "cu126-torch27/" in client.get(f"{filled.url}/simple/").text
        moved = client.get(f"{filled.url}/simple/{PAGE}")
        assert (moved.status_code, moved.headers["location"]) == (301, f"{PAGE}/")


def test_a_wheel_is_taken_once_and_another_one_never_takes_its_name(
    lab: Lab, made: dict[str, Path], tmp_path: Path
) -> None:
    for to in (lab.url, str(tmp_path / "folder")):
        assert send(made, "conv", to=to) == ["added"]
        assert send(made, "conv", to=to) == ["was there"]
        changed = make(kernels(tmp_path / "again", "causal-conv1d", version="1.7.0", text="x = 1\n"), tmp_path / "new")
        assert changed.name == made["conv"].name
        with pytest.raises(IntegrityError, match="has a different file under the name"):
            publish([changed], to, statements=lambda wheel: b"", log=lambda line: None)


def test_a_wheel_for_another_page_or_none_of_ours_is_not_taken(lab: Lab, made: dict[str, Path], tmp_path: Path) -> None:
    def put(page: str, name: str, data: bytes) -> httpx.Response:
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        url = f"{lab.url}/simple/{page}/{quote(name)}"
        return httpx.put(url, auth=("any", lab.write), content=data, headers={"Repr-Digest": f"sha-256=:{digest}:"})

    data, name = made["mamba"].read_bytes(), made["mamba"].name
    wrong = put("cu126-torch27", name, data)
    assert (wrong.status_code, f"is for the index {PAGE}, not for cu126-torch27" in wrong.text) == (422, True)
    assert put(PAGE, name, data[:-9]).status_code == 422
    strange = made["2.11.1"]
    assert put(PAGE, strange.name, strange.read_bytes()).status_code == 403
    assert index.pages(lab.channel) == []
    assert not list((lab.channel / ".uploads").glob("*.part"))


def test_kinds_of_channels_without_a_place_for_wheels_say_so(made: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="has no place for wheels"):
        send(made, "conv", to="s3://bucket/channel")


def test_publishing_without_the_right_is_refused(
    lab: Lab, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.login(lab.read, monkeypatch)
    with pytest.raises(NetworkError, match="may read, but not write"):
        send(made, "conv", to=lab.url)
    assert index.pages(lab.channel) == []


def test_the_task_publishes_packages_and_wheels_with_their_signed_statements(
    lab: Lab, made: dict[str, Path], tmp_path: Path
) -> None:
    key, public = trust.make_key(tmp_path / "keys", "lab")
    local = tmp_path / "local"
    index.add(local, Path(shutil.copy(made["conv"], tmp_path)))
    kernels(local / "linux-64", "causal-conv1d", version="1.7.0")
    command = [sys.executable, "-m", "ssm_forge", "publish", "--to", lab.url, "--sign-key", str(key), "--json"]
    told = environment(
        tmp_path / "home", SSM_FORGE_CHANNEL=str(local), RATTLER_AUTH_FILE=os.environ["RATTLER_AUTH_FILE"]
    )
    ran = subprocess.run(command, capture_output=True, text=True, env=told, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr
    done = {item["filename"].rpartition(".")[2]: item for item in json.loads(ran.stdout)}
    assert {kind: (item["outcome"], item["statement"]) for kind, item in done.items()} == {
        "conda": ("added", True),
        "whl": ("added", True),
    }
    folder = lab.channel / "simple" / PAGE
    sidecar = (folder / f"{made['conv'].name}.sigs").read_bytes()
    digest = sha256_of(made["conv"])
    _, content = trust.verify(sidecar, made["conv"].name, digest, [trust.load_public(public)])
    materials = content["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert [m["annotations"]["role"] for m in materials] == ["recipe and patches", "source", "conda package"]
    assert upkeep.check(open_source(str(lab.channel))) == ([], 1)
    assert select(["causal-conv1d"], local) == ([local / "simple" / PAGE / made["conv"].name], ["causal-conv1d"])


# --- the real installers ----------------------------------------------------------------------------------------------


def run(command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    kept = environment(home, UV_CACHE_DIR=str(home / "uv"), PIP_CACHE_DIR=str(home / "pip"), PIP_NO_INPUT="1")
    kept.pop("PYTHONPATH")
    return subprocess.run(command, capture_output=True, text=True, env=kept, check=False)


@pytest.fixture
def installers(tmp_path: Path) -> dict[str, list[str]]:
    """How each tool is asked to install into a new venv."""
    env = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert uv is not None, "the tools have uv"
    return {
        "python": [str(env / "bin/python")],
        "uv": [uv, "pip", "install", "--no-config", "--python", str(env / "bin/python")],
        "pip": [sys.executable, "-m", "pip", "--python", str(env / "bin/python"), "install", "--isolated"],
    }


ASK = (
    "import mamba_ssm, causal_conv1d, importlib.metadata as m;print(m.version('mamba-ssm'), m.version('causal-conv1d'))"
)


@pytest.mark.parametrize("tool", ["uv", "pip"])
@pytest.mark.timeout(600)
def test_uv_and_pip_install_from_the_server_and_refuse_another_torch_when_they_resolve(
    filled: Lab, made: dict[str, Path], installers: dict[str, list[str]], tmp_path: Path, tool: str
) -> None:
    torches = ["--find-links", str(made["2.11.1"].parent)]
    option = "--default-index" if tool == "uv" else "--index-url"
    page = [option, with_token(filled, f"simple/{PAGE}/")]
    refused = run([*installers[tool], *page, *torches, "mamba-ssm", "torch==2.7.0"], tmp_path / "home")
    assert refused.returncode != 0
    assert "2.11" in refused.stderr + refused.stdout and "torch" in refused.stderr
    without = run([*installers[tool], option, f"{filled.url}/simple/{PAGE}/", *torches, "mamba-ssm"], tmp_path / "home")
    assert without.returncode != 0
    assert "401" in without.stderr + without.stdout
    done = run([*installers[tool], *page, *torches, "mamba-ssm"], tmp_path / "home")
    assert done.returncode == 0, done.stderr
    asked = subprocess.run([*installers["python"], "-c", ASK], capture_output=True, text=True, check=True).stdout
    assert asked == "2.3.2.post1+cu130torch2.11 1.7.0+cu130torch2.11\n"


@pytest.mark.parametrize("tool", ["uv", "pip"])
@pytest.mark.timeout(600)
def test_a_folder_does_for_find_links(
    made: dict[str, Path], installers: dict[str, list[str]], tmp_path: Path, tool: str
) -> None:
    send(made, "conv", "mamba", to=str(tmp_path / "channel"))
    links = ["--find-links", str(tmp_path / "channel" / "simple" / PAGE), "--find-links", str(made["2.7.0"].parent)]
    done = run([*installers[tool], "--no-index", *links, "mamba-ssm"], tmp_path / "home")
    assert done.returncode == 0, done.stderr
    asked = subprocess.run([*installers["python"], "-c", ASK], capture_output=True, text=True, check=True).stdout
    assert asked == "2.3.2.post1+cu130torch2.11 1.7.0+cu130torch2.11\n"


# --- housekeeping -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, made: dict[str, Path]) -> Path:
    channel = tmp_path / "channel"
    send(made, "conv", "mamba", to=str(channel))
    return channel


def kinds(channel: Path) -> list[str]:
    return [f"{p.kind}: {Path(p.file).name}" for p in upkeep.check(open_source(str(channel)))[0]]


def test_check_finds_each_damage_and_repair_mends_it(folder: Path, made: dict[str, Path]) -> None:
    assert upkeep.check(open_source(str(folder))) == ([], 2)
    place = folder / "simple" / PAGE
    mamba, conv = place / made["mamba"].name, place / made["conv"].name
    page = place / "mamba-ssm" / "index.html"
    page.write_bytes(page.read_bytes() + b"<!-- -->")
    (place / f"{conv.name}.metadata").write_text("other")
    (place / f"{conv.name.replace('1.7.0', '1.6.0')}.metadata").write_text("of none")
    assert kinds(folder) == [
        f"index: {conv.name}.metadata",
        "index: index.html",
        f"orphan: {conv.name.replace('1.7.0', '1.6.0')}.metadata",
    ]
    assert upkeep.repair(folder) == []
    assert kinds(folder) == []
    data = mamba.read_bytes()
    mamba.write_bytes(data[:-30] + b"x" * 30)
    assert kinds(folder) == [f"changed: {mamba.name}"]
    (line,) = upkeep.repair(folder)
    assert "set aside" in line
    assert kinds(folder) == []
    assert index.projects(folder, PAGE) == ["causal-conv1d"]
    (folder / "simple" / PAGE / "causal-conv1d" / "index.json").write_text("no JSON")
    assert kinds(folder) == ["index: simple"]
    assert upkeep.repair(folder) == []
    assert kinds(folder) == []
    conv.unlink()
    assert kinds(folder) == [f"missing: {conv.name}"]


def test_over_http_too_check_and_mirror_compare_every_byte(lab: Lab, made: dict[str, Path], tmp_path: Path) -> None:
    send(made, "conv", "mamba", "other", to=lab.url)
    assert upkeep.check(open_source(lab.url)) == ([], 3)
    (lab.channel / "simple" / PAGE / made["conv"].name).write_bytes(b"other")
    (problem,) = upkeep.check(open_source(lab.url))[0]
    assert problem.kind == "changed"
    with pytest.raises(IntegrityError, match="but is listed with"):
        upkeep.mirror(open_source(lab.url), tmp_path / "second", only=["causal*"], log=lambda line: None)
    assert not list((tmp_path / "second").glob("simple/*/*.whl"))


def test_prune_keeps_the_newest_and_what_it_requires(folder: Path, made: dict[str, Path], tmp_path: Path) -> None:
    newer = make(kernels(tmp_path, "causal-conv1d", version="1.8.0"), tmp_path / "newer")
    rebuilt = make(kernels(tmp_path, number=4, depends=("causal-conv1d ==1.7.0",)), tmp_path / "newer")
    tree = make(kernels(tmp_path, version="1.1.1", tree="ab" * 32), tmp_path / "newer")
    older_tree = make(kernels(tmp_path, version="1.1.0", tree="cd" * 32), tmp_path / "newer")
    publish([newer, rebuilt, tree, older_tree], str(folder), statements=lambda wheel: b"", log=lambda line: None)
    planned = upkeep.prune(folder, keep=1, dry_run=True)
    assert planned.packages == (f"simple/{PAGE}/{made['mamba'].name}",)
    assert len(list(folder.glob("simple/*/*.whl"))) == 6
    assert upkeep.prune(folder, keep=1, dry_run=False) == planned
    left = {path.name for path in folder.glob("simple/*/*.whl")}
    assert left == {path.name for path in (made["conv"], newer, rebuilt, tree, older_tree)}
    assert not list(folder.glob(f"simple/{PAGE}/{made['mamba'].name}*"))
    assert kinds(folder) == []


def test_a_mirror_has_the_same_bytes(reading: Lab, made: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "mirror"
    assert upkeep.mirror(open_source(reading.url), target, only=["mamba*"], log=lambda line: None) == (2, 0)
    assert upkeep.mirror(open_source(reading.url), target, only=[], log=lambda line: None) == (1, 2)
    channels.ensure_indexed(target)
    assert kinds(target) == []
    assert sha256_of(target / "simple" / PAGE / made["mamba"].name) == sha256_of(made["mamba"])


def test_the_tasks_tell_of_wheels(reading: Lab) -> None:
    table = json.loads(CliRunner().invoke(channel_command, ["coverage", reading.url, "--json"]).output)
    row = next(row for row in table if (row["project"], row["torch"]) == ("mamba-ssm", "2.7"))
    assert row["cuda"] == "12.6"
    assert any(name.endswith(".whl") for names in row["pythons"].values() for name in names)
    checked = CliRunner().invoke(channel_command, ["check", str(reading.channel)])
    assert "0 packages and 3 wheels, all listed, present and intact" in " ".join(checked.output.split())
