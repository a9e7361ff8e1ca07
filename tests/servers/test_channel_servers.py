"""Publishing to and installing from servers that are not ours."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from lab import make_package

from real_servers import asked, nginx, quetz, recorder, s3
from ssm_forge.install import marker

pytest.importorskip("cryptography", reason="cryptography is not in this environment; the tools of ./run have it")

from ssm_forge.base.errors import IntegrityError, NetworkError, UsageError
from ssm_forge.channel import index as repodata
from ssm_forge.channel import others as remote
from ssm_forge.channel import statement as trust
from ssm_forge.publish import to_hosted
from ssm_forge.publish.send import publish
from ssm_forge.solve.solver import Request, solve

NAME = "tool-1.0-h1_0.conda"
TOKEN = "a-token-of-the-tests"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSM_FORGE_CACHE_DIR", str(tmp_path / "cache"))


def login(folder: Path, monkeypatch: pytest.MonkeyPatch, **entry: Any) -> None:
    path = folder / "auth.json"
    path.write_text(json.dumps({"127.0.0.1": entry}))
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(path))


def install(url: str, folder: Path) -> str:
    """Install ``tool`` from a channel as ``install-mamba`` does; returns what it holds."""
    from ssm_forge.base.paths import Workspace
    from ssm_forge.base.ui import open_log
    from ssm_forge.install import prefix as installing

    place = Workspace(root=folder, cache=folder / "cache")
    told = marker.Installed(variant="x", python="3.12", source="conda", packages=(), created=True)
    with open_log(folder / "logs", "install") as log:
        installing.install(solve(Request(specs=("tool",), channels=(url,))), folder / "prefix", told, place, log)
    return (folder / "prefix" / "share" / "tool.txt").read_text()


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import boto3

    with s3(tmp_path) as url:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": TOKEN,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="lab")
        yield "s3://lab/channel"


def stored(name: str) -> bytes:
    import boto3

    body: bytes = boto3.client("s3").get_object(Bucket="lab", Key=f"channel/linux-64/{name}")["Body"].read()
    return body


def test_s3(bucket: str, tmp_path: Path) -> None:
    package = make_package(tmp_path / "made", provenance=True)
    key, _ = trust.make_key(tmp_path / "keys", "lab")
    done = publish([package], bucket, statements=trust.writer(key, ()))
    assert (done[0].outcome, done[0].statement) == ("added", True)
    assert stored(NAME) == package.read_bytes()
    record = repodata.records(stored("repodata.json"), "repodata.json")[NAME]
    assert record.sha256 == done[0].sha256
    assert stored(f"{NAME}.sigs.{record.attestations_sha256}") == stored(f"{NAME}.sigs")
    assert json.loads(stored("run_exports.json"))["packages.conda"] == {NAME: {"run_exports": {}}}
    assert publish([package], bucket)[0].outcome == "was there"
    with pytest.raises(IntegrityError, match="different file under the name"):
        publish([make_package(tmp_path / "forged", text="forged\n")], bucket)
    assert stored(NAME) == package.read_bytes()


def test_s3_takes_up_what_a_killed_run_left(bucket: str, tmp_path: Path) -> None:
    import boto3

    package = make_package(tmp_path / "made")
    key = f"channel/linux-64/{NAME}"
    boto3.client("s3").put_object(Bucket="lab", Key=key, Body=package.read_bytes())
    assert publish([package], bucket)[0].outcome == "was there"
    assert NAME in repodata.records(stored("repodata.json"), "repodata.json")


def test_s3_two_publishers_at_once(bucket: str, tmp_path: Path) -> None:
    packages = [make_package(tmp_path / "made", f"p{number}") for number in range(6)]
    failures: list[BaseException] = []

    def work(mine: list[Path]) -> None:
        try:
            publish(mine, bucket)
        except BaseException as error:
            failures.append(error)

    threads = [Thread(target=work, args=(packages[half::2],)) for half in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not failures
    listed = repodata.records(stored("repodata.json"), "repodata.json")
    assert set(listed) == {package.name for package in packages}


def test_s3_errors_name_the_cause_and_no_secret(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_package(tmp_path / "made")
    with pytest.raises(UsageError, match="no bucket 'elsewhere'"):
        publish([package], "s3://elsewhere/x")
    monkeypatch.setattr("ssm_forge.base.web.time.sleep", lambda seconds: None)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match="could not be reached") as caught:
        publish([package], bucket)
    assert TOKEN not in str(caught.value)


def test_quetz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with quetz(tmp_path) as (url, key):
        to = url.replace("http://", "quetz+http://") + "/lab"
        package = make_package(tmp_path / "made")
        with pytest.raises(NetworkError) as caught:
            publish([package], to)
        assert "QUETZ_API_KEY" in str(caught.value) or "401" in str(caught.value)
        login(tmp_path, monkeypatch, CondaToken=key)
        assert publish([package], to)[0].outcome == "added"
        read = f"{url}/get/lab"
        for _ in range(600):
            if remote.find(NAME, (read,)):
                break
            time.sleep(0.1)
        assert publish([package], to)[0].outcome == "was there"
        with pytest.raises(IntegrityError, match="different file under the name"):
            publish([make_package(tmp_path / "forged", text="forged\n")], to)
        assert install(read, tmp_path) == "data\n"
        record = (tmp_path / "prefix" / "conda-meta" / "tool-1.0-h1_0.json").read_text()
        assert key not in record
        monkeypatch.delenv("RATTLER_AUTH_FILE")
        monkeypatch.setenv("QUETZ_API_KEY", key)
        assert publish([package, make_package(tmp_path / "made", "more")], to)[1].outcome == "added"


@pytest.mark.parametrize("way", ["basic", "bearer"])
def test_nginx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    channel = tmp_path / "channel"
    publish([make_package(tmp_path / "made")], str(channel))
    with nginx(tmp_path, channel, TOKEN) as url:
        assert httpx.get(f"{url}/{way}/linux-64/repodata.json").status_code == 401
        with pytest.raises(NetworkError, match="could not be read"):
            remote.find(NAME, (f"{url}/{way}",))
        if way == "basic":
            login(tmp_path, monkeypatch, BasicHTTP={"username": "lab", "password": TOKEN})
        else:
            login(tmp_path, monkeypatch, BearerToken=TOKEN)
        assert remote.find(NAME, (f"{url}/{way}",)) is not None
        assert install(f"{url}/{way}", tmp_path) == "data\n"
        assert TOKEN not in (tmp_path / "prefix" / "conda-meta" / "tool-1.0-h1_0.json").read_text()
        with pytest.raises(UsageError, match="takes no uploads that we know"):
            publish([make_package(tmp_path / "made")], f"{url}/{way}")


def test_artifactory_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small fake: that the repository, the folder and the token end up where Artifactory expects them."""
    monkeypatch.setenv("ARTIFACTORY_TOKEN", TOKEN)
    with recorder(tmp_path) as url:
        to = url.replace("http://", "artifactory+http://")
        publish([make_package(tmp_path / "made")], f"{to}/artifactory/conda-lab")
        seen = asked(tmp_path)
    assert seen[0][:2] == ("GET", "/artifactory/conda-lab/linux-64/repodata.json")
    assert ("PUT", f"/artifactory/conda-lab/linux-64/{NAME}", f"Bearer {TOKEN}") in seen


@pytest.mark.parametrize(
    ("maker", "wanted"),
    [
        (to_hosted._prefix, ("POST", "/api/v1/upload/lab", f"Bearer {TOKEN}")),
        (to_hosted._anaconda, ("POST", f"/stage/lab/tool/1.0/linux-64/{NAME}", f"token {TOKEN}")),
    ],
)
def test_prefix_and_anaconda_arguments(
    tmp_path: Path, maker: Callable[[str, str], to_hosted.Hosted], wanted: tuple[str, str, str]
) -> None:
    """Small fakes, as above. Their answers are not the real servers', so only what is sent is compared."""
    package = make_package(tmp_path / "made")
    with recorder(tmp_path) as url:
        try:
            maker(url, "lab").upload([str(package)], TOKEN)
        except Exception as error:
            assert TOKEN not in str(error)
        seen = [(method, where.split("?")[0], who) for method, where, who in asked(tmp_path)]
    assert wanted in seen


@pytest.mark.parametrize(
    ("url", "read"),
    [
        ("https://prefix.dev/lab", "https://repo.prefix.dev/lab"),
        ("https://anaconda.org/lab", "https://conda.anaconda.org/lab"),
        ("https://anaconda.org/lab/label/dev", "https://conda.anaconda.org/lab/label/dev"),
        ("quetz://h.example/lab", "https://h.example/get/lab"),
        ("artifactory://h.example/artifactory/lab", "https://h.example/artifactory/lab"),
        ("artifactory://h.example/lab", "https://h.example/lab"),
    ],
)
def test_hosted_channels_are_known_by_their_address(url: str, read: str) -> None:
    target = to_hosted.target(url)
    assert isinstance(target, to_hosted.HostedTarget)
    assert target._hosted.read_url == read


@pytest.mark.parametrize("url", ["quetz://h.example", "https://prefix.dev/"])
def test_a_hosted_server_without_a_channel_is_an_error(url: str) -> None:
    with pytest.raises(UsageError, match="names a server, but no channel"):
        to_hosted.target(url)
