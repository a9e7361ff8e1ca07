"""Installing into prefixes: whole or not at all, foreign packages stay, killed runs are cleared up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conda_channel import holds, index, make_package
from front_door import own_environment
from ssm_forge.base.errors import InstallError, IntegrityError, SolveError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import open_log
from ssm_forge.install import marker as install_marker
from ssm_forge.install import prefix as install
from ssm_forge.install import registry
from ssm_forge.install.marker import MARKER, Installed
from ssm_forge.package import installed as package_installed
from ssm_forge.package.write import InfoFiles, dump_json, rewrite_info
from ssm_forge.solve import prefix as solve_prefix

SITE = "lib/python3.12/site-packages"
OURS = ("mamba-ssm", "python 3.12.*")


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return Workspace(root=tmp_path, cache=tmp_path / "cache")


@pytest.fixture
def channel(pristine_channel: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_channel, tmp_path / "channel"))


@pytest.fixture(scope="module")
def pristine_channel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fake ``python`` of three versions, ``pytorch`` of two, and kernels that fit one torch only."""
    folder = tmp_path_factory.mktemp("pristine") / "channel"
    for version in ("3.11.5", "3.12.1", "3.12.9"):
        make_package(folder, "python", {"bin/python": f"#!/bin/sh\necho {version}\n"}, version=version)
    for version in ("2.10.0", "2.11.0"):
        make_package(folder, "pytorch", {"share/torch.txt": f"{version}\n"}, version=version)
    make_package(folder, "causal-conv1d", {"share/conv.txt": "conv\n"}, depends=("pytorch 2.11.*", "python 3.12.*"))
    make_package(
        folder,
        "mamba-ssm",
        {"share/mamba.txt": "mamba\n"},
        depends=("pytorch 2.11.*", "causal-conv1d", "python 3.12.*"),
    )
    make_package(folder, "extra", {"share/extra.txt": "extra\n"})
    index(folder)
    return folder


def installed(*, created: bool = True) -> Installed:
    return Installed("cu130", "3.12", "bridge", ("mamba-ssm-1.0-h1_0.conda",), created)


def solved(channel: Path, *specs: str, prefix: Path | None = None):  # type: ignore[no-untyped-def]
    return solve_prefix.solve_for_prefix(specs, (channel.as_uri(),), prefix=prefix, cuda="13.0")


def put(place: Workspace, prefix: Path, records, *, created: bool = True) -> None:  # type: ignore[no-untyped-def]
    with open_log(place.logs, "test") as log:
        install.install(records, prefix, installed(created=created), place, log)


@pytest.fixture
def own(channel: Path, place: Workspace) -> Path:
    prefix = place.envs / "cu130"
    put(place, prefix, solved(channel, *OURS))
    return prefix


@pytest.fixture
def foreign(channel: Path, place: Workspace, tmp_path: Path) -> Path:
    """An environment that somebody else made, with python 3.12.1."""
    prefix = tmp_path / "foreign"
    put(place, prefix, solved(channel, "python ==3.12.1", "extra"))
    (prefix / MARKER).unlink()
    return prefix


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_new_prefix_holds_the_packages_and_says_whose_it_is(own: Path) -> None:
    assert set(package_installed.records(own)) == {"python", "pytorch", "causal-conv1d", "mamba-ssm"}
    assert package_installed.records(own)["pytorch"].version == "2.11.0"
    assert install_marker.read_marker(own) == installed()
    assert not install_marker.is_foreign(own)
    assert (own / "conda-meta/history").exists()
    assert names(own.parent) == {"cu130", ".cu130.lock"}


def test_files_that_hold_the_prefix_hold_its_final_place(channel: Path, place: Workspace) -> None:
    placeholder = "/placeholder" * 20
    plain = make_package(channel.parent / "plain", "where", {"where.txt": f"{placeholder}/share\n"})

    def declare(files: InfoFiles) -> InfoFiles:
        paths = json.loads(files["info/paths.json"])
        paths["paths"][0].update(prefix_placeholder=placeholder, file_mode="text")
        return {**files, "info/paths.json": dump_json(paths)}

    rewrite_info(plain, channel / "linux-64" / plain.name, declare)
    index(channel)
    put(place, place.envs / "cu130", solved(channel, "where"))
    assert (place.envs / "cu130/where.txt").read_text() == f"{place.envs / 'cu130'}/share\n"


def failing(*args: object, **kwargs: object) -> None:
    raise RuntimeError("injected: disk full")


def test_a_failure_leaves_no_new_prefix(channel: Path, place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    records = solved(channel, *OURS)
    prefix = place.envs / "cu130"
    monkeypatch.setattr(install, "write_marker", failing)
    with pytest.raises(RuntimeError):
        put(place, prefix, records)
    assert names(prefix.parent) == {".cu130.lock"}


def test_a_package_whose_bytes_changed_is_refused_and_nothing_is_left(channel: Path, place: Workspace) -> None:
    records = solved(channel, *OURS)
    (channel / "linux-64/mamba-ssm-1.0-h1_0.conda").write_bytes(b"not a package")
    with pytest.raises(IntegrityError, match=r"mamba-ssm-1\.0-h1_0\.conda"):
        put(place, place.envs / "cu130", records)
    assert names(place.envs) == {".cu130.lock"}


def test_a_package_that_can_not_be_linked_is_one_error(
    channel: Path, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = solved(channel, *OURS)
    monkeypatch.setattr("ssm_forge.install.prefix.require_all_intact", lambda files: None)
    (channel / "linux-64/mamba-ssm-1.0-h1_0.conda").write_bytes(b"not a package")
    with pytest.raises(IntegrityError, match=r"not what its channel's index says: .*mamba-ssm-1\.0-h1_0") as error:
        put(place, place.envs / "cu130", records)
    assert error.value.log is not None
    assert names(place.envs) == {".cu130.lock"}


def test_what_the_engine_writes_after_its_failure_is_removed_too(
    channel: Path, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmtree = shutil.rmtree
    late = ["lib", "conda-meta"]

    def written_to_once_more(path: Path, ignore_errors: bool = False) -> None:
        rmtree(path, ignore_errors=ignore_errors)
        # Where py-rattler 0.28 makes a prefix, and where 0.25 does.
        if (".new-" in path.name or path.name == "cu130") and late:
            (path / late.pop()).mkdir(parents=True)

    monkeypatch.setattr(shutil, "rmtree", written_to_once_more)
    monkeypatch.setattr(install, "write_marker", failing)
    with pytest.raises(RuntimeError):
        put(place, place.envs / "cu130", solved(channel, *OURS))
    assert not late
    assert names(place.envs) == {".cu130.lock"}


def test_a_failure_leaves_the_old_prefix_as_it_was(
    own: Path, channel: Path, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "mine.txt").write_text("mine\n")
    records = solved(channel, *OURS, "extra")
    monkeypatch.setattr(install, "write_marker", failing)
    with pytest.raises(RuntimeError):
        put(place, own, records)
    assert (own / "mine.txt").read_text() == "mine\n"
    assert "extra" not in package_installed.records(own)


@pytest.mark.skipif(
    not install._engine_relocates(), reason="the py-rattler here makes a prefix in its place: none is renamed into it"
)
def test_the_old_prefix_comes_back_when_the_new_one_can_not_take_its_place(
    own: Path, channel: Path, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(OSError, match="busy"):
        put(place, own, solved(channel, *OURS))
    assert install_marker.read_marker(own) == installed()
    assert names(own.parent) == {"cu130", ".cu130.lock"}


def test_a_foreign_prefix_keeps_its_packages_to_the_version(foreign: Path, channel: Path, place: Workspace) -> None:
    assert install_marker.is_foreign(foreign)
    (foreign / "mine.txt").write_text("mine\n")
    put(place, foreign, solved(channel, *OURS, prefix=foreign), created=False)
    found = {name: record.version for name, record in package_installed.records(foreign).items()}
    # 3.12.9 satisfies the request too; the one that was there stays.
    assert found == {
        "python": "3.12.1",
        "extra": "1.0",
        "pytorch": "2.11.0",
        "causal-conv1d": "1.0",
        "mamba-ssm": "1.0",
    }
    assert (foreign / "mine.txt").exists()
    assert (foreign / "share/extra.txt").read_text() == "extra\n"
    assert install_marker.is_foreign(foreign)
    marker = install_marker.read_marker(foreign)
    assert marker is not None
    assert not marker.created


def test_a_new_environment_has_the_locked_packages_to_the_version(channel: Path, place: Workspace) -> None:
    locked = solved(channel, "python ==3.12.1", "pytorch", "extra")
    records = solve_prefix.solve_for_prefix(OURS, (channel.as_uri(),), prefix=None, cuda="13.0", locked=locked)
    put(place, place.envs / "cu130", records)
    found = {name: record.version for name, record in package_installed.records(place.envs / "cu130").items()}
    assert found == {r.name.normalized: str(r.version) for r in locked} | {"causal-conv1d": "1.0", "mamba-ssm": "1.0"}
    assert found["python"] == "3.12.1"
    assert holds(place.envs / "cu130", locked)
    assert not holds(place.envs / "cu130", locked[1:])
    assert not holds(place.envs / "cu999", locked)


def test_a_package_comes_from_the_first_channel_that_has_it(channel: Path, tmp_path: Path) -> None:
    later = tmp_path / "later"
    make_package(later, "pytorch", {"share/torch.txt": "another ABI\n"}, version="2.11.1")
    index(later)
    records = solve_prefix.solve_for_prefix(OURS, (channel.as_uri(), later.as_uri()), prefix=None, cuda="13.0")
    assert [str(r.version) for r in records if r.name.normalized == "pytorch"] == ["2.11.0"]


def test_what_the_user_says_of_the_machine_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CUDA", "12.4"), ("CUDA_ARCH", "8.6"), ("GLIBC", "2.17")):
        monkeypatch.setenv(f"CONDA_OVERRIDE_{name}", value)
    found = {v.name: v.version for v in solve_prefix.target_machine("13.0", None)}
    assert (found["__cuda"], found["__cuda_arch"], found["__glibc"]) == ("12.4", "8.6", "2.17")


@pytest.mark.parametrize("there", ["pytorch ==2.10.0", "python ==3.11.5"])
def test_a_foreign_prefix_with_another_torch_or_python_is_refused_with_the_reason(
    channel: Path, place: Workspace, tmp_path: Path, there: str
) -> None:
    prefix = tmp_path / "other"
    put(place, prefix, solved(channel, there))
    (prefix / MARKER).unlink()
    with pytest.raises(SolveError) as error:
        solved(channel, *OURS, prefix=prefix)
    assert f"no set of packages satisfies {prefix}" in error.value.what
    assert there.split()[0] in error.value.what
    assert set(package_installed.records(prefix)) == {there.split()[0]}


def test_a_wrong_pin_is_refused_with_the_reason(channel: Path) -> None:
    with pytest.raises(SolveError) as error:
        solved(channel, "mamba-ssm", "pytorch 2.10.*")
    assert "pytorch" in error.value.what
    assert "2.11" in error.value.what


def test_our_own_packages_in_a_foreign_prefix_are_replaced(foreign: Path, channel: Path, place: Workspace) -> None:
    put(place, foreign, solved(channel, *OURS, prefix=foreign), created=False)
    make_package(channel, "mamba-ssm", {"share/mamba.txt": "two\n"}, version="2.0", depends=("causal-conv1d",))
    index(channel)
    put(place, foreign, solved(channel, "mamba-ssm ==2.0", prefix=foreign), created=False)
    assert (foreign / "share/mamba.txt").read_text() == "two\n"
    assert package_installed.records(foreign)["python"].version == "3.12.1"


def test_leftovers_of_killed_runs_are_swept_and_never_chosen(own: Path, channel: Path, place: Workspace) -> None:
    for name in (".cu130.new-1", ".cu130.old-2"):
        (own.parent / name / "conda-meta").mkdir(parents=True)
        install_marker.write_marker(own.parent / name, installed())
    assert registry.installed_prefixes(place) == [own]
    put(place, own, solved(channel, *OURS))
    assert names(own.parent) == {"cu130", ".cu130.lock"}


def test_killed_between_the_two_renames_the_old_prefix_comes_back_first(
    own: Path, channel: Path, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.rename(own.with_name(".cu130.old-1"))
    records = solved(channel, *OURS)
    monkeypatch.setattr(install, "_link", failing)
    with pytest.raises(RuntimeError):
        put(place, own, records)
    assert install_marker.read_marker(own) == installed()


@pytest.mark.parametrize("text", ["", "{", "{}", '{"variant": 1, "packages": null}', "[]"])
def test_a_damaged_marker_is_none(own: Path, text: str) -> None:
    (own / MARKER).write_text(text)
    assert install_marker.read_marker(own) is None
    assert install_marker.is_foreign(own)


def test_a_damaged_record_is_one_error(own: Path) -> None:
    (own / "conda-meta/mamba-ssm-1.0-h1_0.json").write_text("{")
    with pytest.raises(InstallError, match=r"record .*mamba-ssm-1\.0-h1_0\.json can't be read"):
        package_installed.records(own)
    with pytest.raises(InstallError, match=r"record .*mamba-ssm-1\.0-h1_0\.json can't be read"):
        holds(own, ())


def test_what_other_installers_leave_out_is_no_damage(own: Path) -> None:
    """conda writes null for what it does not know, and older ones wrote no kind of a path."""
    file = own / "conda-meta/old-1.0-0.json"
    told = {"name": "old", "version": "1.0", "build": "0", "sha256": None, "files": None, "depends": None}
    file.write_text(json.dumps({**told, "paths_data": {"paths": [{"_path": "bin/old"}]}}))
    found = package_installed.records(own)["old"]
    assert (found.filename, found.url, found.sha256, found.depends, found.files) == ("", "", "", (), ())
    assert found.paths == (package_installed.InstalledPath("bin/old", "", "", "", placeholder=False),)
    for path in ("../x", "/etc/passwd"):
        file.write_text(json.dumps({**told, "paths_data": {"paths": [{"_path": path}]}}))
        with pytest.raises(InstallError, match=r"record .*old-1\.0-0\.json can't be read \(its _path is"):
            package_installed.records(own)


def test_a_folder_that_is_no_environment_is_refused(tmp_path: Path) -> None:
    install_marker.check_target(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    install_marker.check_target(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(InstallError, match="is not a conda environment"):
        install_marker.check_target(tmp_path / "full")


def test_prefixes_outside_the_workspace_are_remembered_newest_first(
    own: Path, channel: Path, place: Workspace, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    put(place, elsewhere, solved(channel, "extra"))
    os.utime(own / MARKER, (1, 1))
    for prefix in (own, elsewhere, elsewhere):
        registry.remember(prefix, place)
    assert registry.installed_prefixes(place) == [elsewhere, own]
    (elsewhere / MARKER).unlink()
    assert registry.installed_prefixes(place) == [own]


def test_two_installations_into_one_prefix_wait_for_each_other(own: Path, channel: Path, place: Workspace) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[1].split(':'); import test_prefix as t\n"
        "from ssm_forge.base.paths import Workspace\n"
        "place = Workspace(Path(sys.argv[2]), Path(sys.argv[2]) / 'cache')\n"
        "channel = Path(sys.argv[3])\n"
        "t.put(place, place.envs / 'cu130', t.solved(channel, *t.OURS))\n"
        "from ssm_forge.base.ending import end; end(0)\n"
    )
    command = [sys.executable, "-c", script, os.pathsep.join(sys.path), str(place.root), str(channel)]
    both = [subprocess.Popen(command, env=own_environment(), stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert set(package_installed.records(own)) == {"python", "pytorch", "causal-conv1d", "mamba-ssm"}
    assert names(own.parent) == {"cu130", ".cu130.lock"}


def test_what_was_added_with_pip_is_named(own: Path) -> None:
    for name in ("einops-0.8.2", "wandb-1.0"):
        (own / SITE / f"{name}.dist-info").mkdir(parents=True)
        (own / SITE / f"{name}.dist-info/METADATA").write_text("Metadata-Version: 2.1\n")
    assert package_installed.added_by_hand(own) == ["einops-0.8.2", "wandb-1.0"]
    assert package_installed.added_by_hand(own.with_name("nothing")) == []
