"""Two first runs make the same folder at once: the one that comes second uses what the first made."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest

from ssm_forge.base.folders import give_place
from ssm_forge.base.paths import Workspace
from ssm_forge.bridge import deb_file, debian
from ssm_forge.build import compile_cache
from ssm_forge.verify import gpu


def test_the_first_one_stays(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        give_place(tmp_path / name, tmp_path / "place" / "target")
    assert (tmp_path / "place" / "target" / "file").read_text() == "first"


def test_another_reason_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        give_place(tmp_path / "missing", tmp_path / "target")
    (tmp_path / "made").mkdir()
    (tmp_path / "target").write_text("a file")
    with pytest.raises(NotADirectoryError):
        give_place(tmp_path / "made", tmp_path / "target")


def test_the_compile_cache_of_another_run_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Workspace(tmp_path, tmp_path / "cache")
    place.bridge_locks.mkdir(parents=True)
    (place.bridge_locks / "debs.ccache.toml").write_text("deb = []")

    targets: list[Path] = []

    def unpack(path: Path, target: Path) -> None:
        """ccache; while the first run unpacks it, a second one finishes."""
        (target / "usr/bin").mkdir(parents=True)
        shutil.copy("/bin/true", target / "usr/bin/ccache")
        targets.append(target)
        if len(targets) == 1:
            compile_cache._from_debian(place)

    monkeypatch.setattr(debian, "fetch_debs", lambda debs, _: {None: tmp_path})
    monkeypatch.setattr(deb_file, "unpack", unpack)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "patchelf").symlink_to("/bin/true")
    tool = compile_cache._from_debian(place)
    assert len(targets) == 2
    assert tool is not None
    assert tool.exists()
    assert "no compile cache" not in capsys.readouterr().err
    assert [path.name for path in (place.cache / "tools").iterdir()] == [tool.parents[2].name]


@pytest.mark.parametrize("what", ["pytest", "the tests of upstream"])
def test_the_tests_that_another_run_unpacked_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    place = Workspace(tmp_path, tmp_path)
    archive = tmp_path / "p-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("p-1.0/tests/test_a.py")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"pass"))

    def make() -> Path:
        return gpu.lend_pytest(place) if what == "pytest" else gpu._unpack_tests(archive, tmp_path / "out")

    def after_another_run(made: Path, target: Path) -> None:
        monkeypatch.setattr(gpu, "give_place", give_place)
        make()
        give_place(made, target)

    monkeypatch.setattr(gpu, "give_place", after_another_run)
    assert list(make().iterdir())


def test_a_pytest_of_another_version_is_not_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Workspace(tmp_path, tmp_path)
    first = gpu.lend_pytest(place)
    assert gpu.lend_pytest(place) == first
    monkeypatch.setattr(gpu.metadata, "version", lambda name: "0.1")
    assert gpu.lend_pytest(place) != first
