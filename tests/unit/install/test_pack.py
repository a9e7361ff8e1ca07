"""pack -> unpack with the network cut off, exports, bill of materials."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rattler import RepoDataRecord

from conda_channel import CANONICAL, demo_channel, index, lock_channel, make_package
from ssm_forge.base.arch import Capability
from ssm_forge.base.errors import InstallError, IntegrityError, SolveError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.unpacking import unpack_tar
from ssm_forge.install import pack as packing
from ssm_forge.install.downloads import Mirror, local_file, require_plain_names
from ssm_forge.install.from_lock import create
from ssm_forge.install.integrity import verify
from ssm_forge.package import intact
from ssm_forge.solve import lock as locks
from ssm_forge.solve.export import FORMATS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("SSM_FORGE_CHANNEL", raising=False)
    return Workspace(root=tmp_path / "workspace", cache=tmp_path / "cache")


@pytest.fixture
def channel(tmp_path: Path) -> Path:
    return demo_channel(tmp_path)


@pytest.fixture
def locked(channel: Path, place: Workspace) -> locks.LockedEnvironment:
    place.root.mkdir()
    lock_channel(channel, place.lock, "tool")
    return locks.environment(place.lock, "demo")


@pytest.fixture
def with_kernels(locked: locks.LockedEnvironment, place: Workspace) -> locks.LockedEnvironment:
    """Two small packages named like the kernels in the workspace's channel, and the lock with them on top."""
    make_package(place.channel, "causal-conv1d", {"lib/conv.txt": "conv"}, depends=("base ==1.0",))
    make_package(place.channel, "mamba-ssm", {"lib/scan.txt": "scan"}, depends=("causal-conv1d", "tool"))
    index(place.channel)
    return packing.add_kernels(locked, place)


@pytest.fixture
def archive(with_kernels: locks.LockedEnvironment, channel: Path, place: Workspace, tmp_path: Path) -> Path:
    target = tmp_path / "demo.tar"
    packing.pack(with_kernels, target, mirrors=[Mirror(CANONICAL, channel)], workspace=place)
    return target


def without_network(*words: str, cache: Path) -> subprocess.CompletedProcess[str]:
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow a network namespace")
    return subprocess.run(
        ["unshare", "-rn", sys.executable, "-m", "ssm_forge", *words],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "scripts"), "SSM_FORGE_CACHE_DIR": str(cache), "PATH": "/usr/bin:/bin"},
    )


def test_unpacks_and_verifies_with_the_network_cut_off(archive: Path, tmp_path: Path, place: Workspace) -> None:
    prefix = tmp_path / "elsewhere" / "env"
    done = without_network("unpack", str(archive), "--prefix", str(prefix), "--json", cache=tmp_path / "other-cache")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"prefix": str(prefix), "packages": 4, "files": 5}
    assert (prefix / "lib/scan.txt").read_text() == "scan"
    unpack_tar(archive, tmp_path / "opened")
    (inside,) = locks.read(tmp_path / "opened" / "ssm-forge-demo" / "pixi.lock")
    assert verify(prefix, inside.records).deviations == ()


def test_the_lock_inside_names_no_path_of_this_machine(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as tar:
        stream = tar.extractfile("ssm-forge-demo/pixi.lock")
        assert stream is not None
        text = stream.read().decode()
    assert str(tmp_path) not in text
    assert "conda: /ssm-forge/channel/linux-64/mamba-ssm-1.0-h1_0.conda" in text
    assert f"{CANONICAL}linux-64/tool-1.0-h1_0.conda" in text


def test_holds_an_indexed_channel(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = {Path(m.name).name for m in tar.getmembers()}
        index_file = tar.extractfile("ssm-forge-demo/channel/linux-64/repodata.json")
        assert index_file is not None
        repodata = json.load(index_file)
    assert len(repodata["packages.conda"]) == 4
    assert {"tool-1.0-h1_0.conda", "mamba-ssm-1.0-h1_0.conda"} <= names


def test_an_installed_environment_packs_and_comes_back(
    with_kernels: locks.LockedEnvironment, channel: Path, place: Workspace, tmp_path: Path
) -> None:
    prefix = tmp_path / "env"
    create(with_kernels, prefix, mirrors=[Mirror(CANONICAL, channel)], workspace=place)
    target = tmp_path / "prefix.tar"
    made = packing.pack(packing.of_prefix(prefix), target, mirrors=[Mirror(CANONICAL, channel)], workspace=place)
    assert (made.packages, len(made.kernels)) == (4, 2)
    copy, report = packing.unpack(target, tmp_path / "copy", workspace=place)
    assert (report.packages, report.deviations) == (4, ())
    assert (copy / "lib/conv.txt").exists()


def test_kernels_that_do_not_fit_are_refused_with_the_reason(locked: locks.LockedEnvironment, place: Workspace) -> None:
    with pytest.raises(SolveError, match="holds no built kernels"):
        packing.add_kernels(locked, place)
    make_package(place.channel, "causal-conv1d", {"x": "x"}, depends=("base ==2.0",))
    make_package(place.channel, "mamba-ssm", {"y": "y"}, depends=("causal-conv1d",))
    index(place.channel)
    with pytest.raises(SolveError, match=r"base ==2\.0"):
        packing.add_kernels(locked, place)


def test_kernels_for_one_gpu_generation_go_only_where_they_run(
    locked: locks.LockedEnvironment, place: Workspace
) -> None:
    make_package(place.channel, "causal-conv1d", {"x": "x"}, depends=("base", "__cuda_arch >=9.0,<10"))
    make_package(place.channel, "mamba-ssm", {"y": "y"}, depends=("causal-conv1d",))
    index(place.channel)
    for gpu in (None, Capability(8, 0)):
        with pytest.raises(SolveError, match=r"(?s)__cuda_arch.*--gpu"):
            packing.add_kernels(locked, place, gpu=gpu)
    packed = packing.add_kernels(locked, place, gpu=Capability(9, 0))
    assert {r.name.normalized for r in packed.records} == {"base", "tool", "causal-conv1d", "mamba-ssm"}
    assert packed.platform == locked.platform


def test_a_damaged_archive_installs_nothing(archive: Path, tmp_path: Path, place: Workspace) -> None:
    data = bytearray(archive.read_bytes())
    position = data.find(b"PK\x03\x04")
    data[position + 200] ^= 1
    archive.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="is not the locked package"):
        packing.unpack(archive, tmp_path / "env", workspace=place)
    assert not (tmp_path / "env").exists()
    archive.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises((IntegrityError, UsageError)):
        packing.unpack(archive, tmp_path / "env", workspace=place)
    assert not (tmp_path / "env").exists()


def test_an_archive_that_writes_elsewhere_is_refused(tmp_path: Path, place: Workspace) -> None:
    evil = tmp_path / "evil.tar"
    (tmp_path / "payload").write_text("x")
    with tarfile.open(evil, "w") as tar:
        tar.add(tmp_path / "payload", "../escaped")
    with pytest.raises(IntegrityError, match="escaped"):
        packing.unpack(evil, tmp_path / "env", workspace=place)
    assert not list(tmp_path.rglob("escaped"))


@pytest.fixture
def opened(archive: Path, tmp_path: Path) -> Path:
    """The archive's folder, for a stranger to change."""
    unpack_tar(archive, tmp_path / "opened")
    return tmp_path / "opened" / "ssm-forge-demo"


def say_in_pack_json(top: Path, **told: object) -> None:
    data = json.loads((top / "pack.json").read_text())
    (top / "pack.json").write_text(json.dumps({**data, **told}))


@pytest.mark.parametrize("name", ["{home}/thesis", "../../thesis", "a/b", "..", ".ssh", "", "-f", "a\n"])
@pytest.mark.parametrize("force", [False, True])
def test_an_archive_does_not_choose_the_folder(
    opened: Path, tmp_path: Path, place: Workspace, name: str, force: bool
) -> None:
    home = tmp_path / "home"
    (home / "thesis").mkdir(parents=True)
    (home / "thesis" / "text").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    say_in_pack_json(opened, environment=name.format(home=home))
    with pytest.raises(IntegrityError, match="is no name of one"):
        packing.unpack(opened, None, workspace=place, force=force)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "told",
    [
        {"installed": {"variant": "cu130"}},
        {"installed": {"variant": 1, "python": "3.12", "source": "conda", "packages": [], "created": True}},
        {"installed": "cu130"},
        {"kernels": [1]},
        {"kernels": None},
        {"environment": 7},
        {"environment": None},
        {"format": "1"},
        {"more": 1},
    ],
)
def test_a_pack_json_that_is_not_understood_installs_nothing(
    opened: Path, tmp_path: Path, place: Workspace, told: dict[str, object]
) -> None:
    say_in_pack_json(opened, **told)
    with pytest.raises(UsageError, match=r"no usable pack\.json"):
        packing.unpack(opened, tmp_path / "env", workspace=place)
    assert not (tmp_path / "env").exists()


def test_a_pack_with_two_environments_is_refused(
    opened: Path, with_kernels: locks.LockedEnvironment, tmp_path: Path, place: Workspace
) -> None:
    other = replace(with_kernels, name="other")
    locks.write_locked((with_kernels, other), opened / "pixi.lock")
    with pytest.raises(IntegrityError, match="2 environments"):
        packing.unpack(opened, tmp_path / "env", workspace=place)


def test_force_replaces_environments_and_nothing_else(archive: Path, tmp_path: Path, place: Workspace) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "text").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for target in (folder, tmp_path / "file"):
        with pytest.raises(InstallError, match="is not a conda environment"):
            packing.unpack(archive, target, workspace=place, force=True)
    assert (folder / "text").read_text() == (tmp_path / "file").read_text() == "precious"
    packing.unpack(archive, tmp_path / "env", workspace=place)
    packing.unpack(archive, tmp_path / "env", workspace=place, force=True)


@pytest.mark.parametrize("told", [{"subdir": "../../up"}, {"fn": "../../../up-1.0-h1_0.conda"}, {"build": "../../up"}])
def test_an_environment_does_not_choose_where_pack_writes(
    with_kernels: locks.LockedEnvironment, channel: Path, place: Workspace, tmp_path: Path, told: dict[str, str]
) -> None:
    mirrors = [Mirror(CANONICAL, channel)]
    prefix = tmp_path / "env"
    create(with_kernels, prefix, mirrors=mirrors, workspace=place)
    record = prefix / "conda-meta" / "tool-1.0-h1_0.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **told}))
    with pytest.raises((IntegrityError, InstallError), match=r"are not a platform|can't be read"):
        packing.pack(packing.of_prefix(prefix), tmp_path / "pack.tar", mirrors=mirrors, workspace=place)
    assert not [path for path in tmp_path.rglob("*up*") if "group" not in path.name]


def test_a_lock_names_no_file_outside_of_a_mirror(channel: Path, place: Workspace, tmp_path: Path) -> None:
    place.root.mkdir()
    lock_channel(channel, place.lock, "tool")
    (record, *_) = locks.environment(place.lock, "demo").records
    (tmp_path / "secret").write_text("x")
    evil = RepoDataRecord(record, record.file_name, f"{CANONICAL}%2e%2e/secret", CANONICAL)
    assert local_file(evil, [Mirror(CANONICAL, channel)]) is None


def test_every_record_of_the_projects_lock_has_plain_names() -> None:
    for environment in locks.read(ROOT / "pixi.lock"):
        require_plain_names(environment.records)


def test_an_environment_of_any_name_packs_and_unpacks(
    with_kernels: locks.LockedEnvironment, channel: Path, place: Workspace, tmp_path: Path
) -> None:
    mirrors = [Mirror(CANONICAL, channel)]
    prefix = tmp_path / ".My Env"
    create(with_kernels, prefix, mirrors=mirrors, workspace=place)
    packing.pack(packing.of_prefix(prefix), tmp_path / "pack.tar", mirrors=mirrors, workspace=place)
    assert packing.unpack(tmp_path / "pack.tar", None, workspace=place)[0] == place.envs / "my-env"


@pytest.mark.slow
def test_a_pack_with_tools_installs_with_nothing_but_python(
    locked: locks.LockedEnvironment, channel: Path, tmp_path: Path
) -> None:
    """Needs the Python package index to make the pack, and no network to install it."""
    from ssm_forge.install.pack_tools import add_tools

    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow a network namespace")
    here = Workspace(root=ROOT, cache=tmp_path / "cache")
    target = tmp_path / "demo.tar"
    mirrors = [Mirror(CANONICAL, channel)]
    packing.pack(locked, target, mirrors=mirrors, workspace=here, add_tools=lambda top: add_tools(top, here))
    unpack_tar(target, tmp_path / "carried")
    prefix = tmp_path / "env"
    done = subprocess.run(
        ["unshare", "-rn", tmp_path / "carried/ssm-forge-demo/install.sh", "--prefix", prefix],
        capture_output=True,
        text=True,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    assert verify(prefix, locked.records).deviations == ()


def test_other_files_are_not_packs(tmp_path: Path, place: Workspace) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"pack\.json"):
        packing.unpack(tmp_path / "folder", None, workspace=place)
    (tmp_path / "text").write_text("no tar at all")
    with pytest.raises(IntegrityError):
        packing.unpack(tmp_path / "text", None, workspace=place)


class TestExports:
    """Of the committed lock's classic environment, which has both kinds of hash."""

    @pytest.fixture
    def cu118(self) -> locks.LockedEnvironment:
        return locks.environment(ROOT / "pixi.lock", "cu118")

    def test_explicit_spec_is_read_back_by_the_engine(self, cu118: locks.LockedEnvironment, tmp_path: Path) -> None:
        from rattler.explicit_environment import ExplicitEnvironmentSpec

        path = tmp_path / "explicit.txt"
        path.write_text(FORMATS["explicit"](cu118))
        entries = ExplicitEnvironmentSpec.from_path(path).packages
        assert {e.url.partition("#")[0] for e in entries} == {r.url for r in cu118.records}
        assert all("#" in line for line in path.read_text().splitlines()[3:])

    def test_explicit_spec_puts_dependencies_first(self, cu118: locks.LockedEnvironment) -> None:
        lines = FORMATS["explicit"](cu118).splitlines()
        position = {
            name: next(i for i, line in enumerate(lines) if f"/{name}-" in line)
            for name in ("python", "pytorch", "libzlib")
        }
        assert position["libzlib"] < position["python"] < position["pytorch"]

    def test_environment_yml_pins_every_package(self, cu118: locks.LockedEnvironment) -> None:
        content = yaml.safe_load(FORMATS["environment"](cu118))
        assert content["channels"] == ["nvidia/label/cuda-11.8.0", "pytorch", "conda-forge", "nodefaults"]
        assert "cuda-nvcc=11.8.89=0" in content["dependencies"]
        assert len(content["dependencies"]) == len(cu118.records)

    def test_conda_lock_has_url_and_hash_of_every_package(self, cu118: locks.LockedEnvironment) -> None:
        content = yaml.safe_load(FORMATS["conda-lock"](cu118))
        assert content["version"] == 1
        assert {p["url"]: p["hash"].get("sha256") or p["hash"]["md5"] for p in content["package"]} == {
            r.url: intact.digest(r)[1] for r in cu118.records
        }

    def test_bill_of_materials_is_valid_and_reproducible(self, cu118: locks.LockedEnvironment) -> None:
        pytest.importorskip("cyclonedx", reason="cyclonedx is not in this environment; the tools of ./run have it")
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator

        text = FORMATS["cyclonedx"](cu118)
        assert text == FORMATS["cyclonedx"](cu118)
        validator = JsonStrictValidator(SchemaVersion.V1_6)
        try:
            error = validator.validate_str(text)
        except Exception as missing:
            pytest.skip(f"the schema validator is not installed: {missing}")
        assert error is None
        data = json.loads(text)
        assert len(data["components"]) == len(cu118.records)
        nvcc = next(c for c in data["components"] if c["name"] == "cuda-nvcc")
        assert nvcc["purl"].startswith("pkg:conda/cuda-nvcc@11.8.89?build=0&channel=nvidia/label/cuda-11.8.0")
        assert [h["alg"] for h in nvcc["hashes"]] == ["MD5"]
