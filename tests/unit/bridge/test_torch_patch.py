from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from ssm_forge.base.errors import BuildError
from ssm_forge.bridge.package import BridgePackage, write
from ssm_forge.bridge.torch_patch import MEMBER, Bounds, make_patch, read_bounds, read_host_config

_ROOT = Path(__file__).parents[3]
_FOLDERS = sorted(path for path in _ROOT.glob("patches/torch/*") if path.is_dir())
_SCRIPT = _ROOT / "recipes/common/patch_torch.py"

_CPP_EXTENSION = """\
import os

MINIMUM_GCC_VERSION = (5, 0, 0)
CUDA_GCC_VERSIONS: VersionMap = {
    '11.6': ((6, 0, 0), (12, 0)),
    '11.7': ((6, 0, 0), (12, 0)),
    '12.9': ((6, 0, 0), (14, 0)),
}

MINIMUM_CLANG_VERSION = (3, 3, 0)
CUDA_CLANG_VERSIONS: VersionMap = {
    '11.3': (MINIMUM_CLANG_VERSION, (12, 0)),
    '11.4': (MINIMUM_CLANG_VERSION, (13, 0)),
    '11.5': (MINIMUM_CLANG_VERSION, (13, 0)),
    '11.7': (MINIMUM_CLANG_VERSION, (14, 0)),
    '12.9': ((7, 0), (20, 0)),
}

__all__ = ["load"]
"""
_BOUNDS = (Bounds("11.8", gcc=11, clang=14), Bounds("12.9", gcc=14, clang=19))


def site_packages(folder: Path, version: str = "2.3.0", text: str = _CPP_EXTENSION) -> Path:
    """A torch with nothing but what gets patched."""
    (folder / MEMBER).parent.mkdir(parents=True)
    (folder / MEMBER).write_text(text)
    (folder / "torch/version.py").write_text(f"__version__ = '{version}+cu118'\n")
    return folder


def patches(folder: Path, version: str = "2.3.0", text: str = _CPP_EXTENSION) -> Path:
    (folder / version).mkdir(parents=True)
    (folder / version / "0001-bounds.patch").write_text(make_patch(version, text, _BOUNDS))
    return folder


def run(patch_folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", _SCRIPT, patch_folder, site, site.with_name("kept")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def tables(site: Path) -> dict[str, dict[str, tuple[object, object]]]:
    scope: dict[str, object] = {"VersionMap": dict}
    exec((site / MEMBER).read_text(), scope)
    return {name: scope[name] for name in ("CUDA_GCC_VERSIONS", "CUDA_CLANG_VERSIONS")}  # type: ignore[misc]


def test_missing_releases_are_added_and_too_strict_ones_widened(tmp_path: Path) -> None:
    site = site_packages(tmp_path / "site")
    done = run(patches(tmp_path / "patches"), site)
    assert done.returncode == 0, done.stderr
    found = tables(site)
    assert found["CUDA_GCC_VERSIONS"]["11.8"] == ((6, 0, 0), (12, 0))
    assert found["CUDA_CLANG_VERSIONS"]["11.8"] == ((3, 3, 0), (15, 0))
    assert found["CUDA_GCC_VERSIONS"]["12.9"] == ((6, 0, 0), (15, 0))
    assert found["CUDA_CLANG_VERSIONS"]["12.9"] == ((7, 0), (20, 0))
    assert list(found["CUDA_GCC_VERSIONS"]) == ["11.6", "11.7", "11.8", "12.9"]


def test_lines_may_have_moved(tmp_path: Path) -> None:
    site = site_packages(tmp_path / "site", text="# a new comment\n\n" + _CPP_EXTENSION)
    assert run(patches(tmp_path / "patches"), site).returncode == 0
    assert "11.8" in tables(site)["CUDA_GCC_VERSIONS"]


def test_a_second_build_in_the_same_environment_finds_it_done(tmp_path: Path) -> None:
    site, folder = site_packages(tmp_path / "site"), patches(tmp_path / "patches")
    assert run(folder, site).returncode == 0
    first = (site / MEMBER).read_text()
    done = run(folder, site)
    assert done.returncode == 0, done.stderr
    assert (site / MEMBER).read_text() == first


def test_a_second_build_with_another_patch_begins_with_the_file_as_it_was(tmp_path: Path) -> None:
    """pixi builds again where it built before, and the patch that changed no longer fits what it once made."""
    site, folder = site_packages(tmp_path / "site"), tmp_path / "patches/2.3.0"
    folder.mkdir(parents=True)
    diff = f"--- a/{MEMBER}\n+++ b/{MEMBER}\n@@ -1,2 +1,3 @@\n import os\n+ADDED = {{}}\n \n"
    for number in (1, 2):
        (folder / "0001-x.patch").write_text(diff.format(number))
        done = run(folder.parent, site)
        assert done.returncode == 0, done.stderr
        assert (site / MEMBER).read_text() == _CPP_EXTENSION.replace("os\n", f"os\nADDED = {number}\n", 1)


@pytest.mark.parametrize(
    "hunk",
    [
        "@@ -1,2 +1,3 @@\n import os\n \n+ADDED = 1\n",
        "@@ -1,3 +1,2 @@\n import os\n \n-MINIMUM_GCC_VERSION = (5, 0, 0)\n",
    ],
    ids=["added at the end of a hunk", "removed at the end of a hunk"],
)
def test_what_is_there_already_is_told_from_what_is_not(tmp_path: Path, hunk: str) -> None:
    site = site_packages(tmp_path / "site")
    folder = tmp_path / "patches"
    (folder / "2.3.0").mkdir(parents=True)
    (folder / "2.3.0/0001-x.patch").write_text(f"--- a/{MEMBER}\n+++ b/{MEMBER}\n{hunk}")
    assert run(folder, site).returncode == 0
    once = (site / MEMBER).read_text()
    assert once != _CPP_EXTENSION
    assert run(folder, site).returncode == 0
    assert (site / MEMBER).read_text() == once


def test_another_patch_release_of_the_minor_takes_the_same_patch(tmp_path: Path) -> None:
    site = site_packages(tmp_path / "site", version="2.3.1")
    assert run(patches(tmp_path / "patches"), site).returncode == 0


def test_a_torch_whose_table_changed_is_refused_by_file_and_hunk(tmp_path: Path) -> None:
    changed = _CPP_EXTENSION.replace("'11.7': (MINIMUM_CLANG_VERSION, (14, 0))", "'11.7': OLD")
    site = site_packages(tmp_path / "site", text=changed)
    done = run(patches(tmp_path / "patches"), site)
    assert done.returncode == 1
    assert "2.3.0/0001-bounds.patch does not fit torch/utils/cpp_extension.py of torch 2.3.0: hunk 2" in done.stderr
    assert (site / MEMBER).read_text() == changed


def test_a_broken_patch_is_refused_by_name(tmp_path: Path) -> None:
    folder = patches(tmp_path / "patches")
    (folder / "2.3.0/0001-bounds.patch").write_text("nothing of a diff\n")
    done = run(folder, site_packages(tmp_path / "site"))
    assert done.returncode == 1
    assert "0001-bounds.patch is not a unified diff" in done.stderr


def test_a_torch_without_patches_names_the_refresh(tmp_path: Path) -> None:
    done = run(patches(tmp_path / "patches"), site_packages(tmp_path / "site", version="9.1.0"))
    assert done.returncode == 1
    assert "no patches for torch 9.1.0" in done.stderr
    assert "bump torch" in done.stderr


def test_an_environment_made_afterwards_has_the_pristine_file(tmp_path: Path) -> None:
    def stage(folder: Path) -> None:
        site_packages(folder / "lib/python3.12/site-packages")

    channel = tmp_path / "channel"
    write(BridgePackage(name="pytorch", version="2.3.0", inputs=(), stage=stage), channel, threads=1)
    first = environment(channel, tmp_path / "first", tmp_path / "cache")
    compiled = first / "torch/utils/__pycache__/cpp_extension.cpython-312.pyc"
    compiled.parent.mkdir()
    compiled.write_bytes(b"stale")
    assert (first / MEMBER).stat().st_nlink > 1, "not a hard link: this test would prove nothing"

    assert run(patches(tmp_path / "patches"), first).returncode == 0

    assert "11.8" in tables(first)["CUDA_GCC_VERSIONS"]
    assert not compiled.exists()
    second = environment(channel, tmp_path / "second", tmp_path / "cache")
    assert (second / MEMBER).read_text() == _CPP_EXTENSION


def environment(channel: Path, prefix: Path, cache: Path) -> Path:
    """Install everything of ``channel`` into ``prefix``; returns its site-packages."""
    import rattler
    from rattler.index import index_fs

    async def make() -> None:
        (channel / "noarch").mkdir(exist_ok=True)
        await index_fs(channel, write_zst=False, write_shards=False)
        records = await rattler.solve(sources=[channel.as_uri()], specs=["pytorch"], platforms=["linux-64", "noarch"])
        await rattler.install(records=records, target_prefix=prefix, cache_dir=cache, show_progress=False)

    asyncio.run(make())
    return prefix / "lib/python3.12/site-packages"


def test_bounds_are_read_from_host_config() -> None:
    text = """
#if __GNUC__ > 13
#error -- unsupported GNU version!
#if (__clang_major__ >= 18) || (__clang_major__ < 3) || ((__clang_major__ == 3) &&  (__clang_minor__ < 3))
#if (__clang_major__ >= 19) || (__clang_major__ < 3) || ((__clang_major__ == 3) &&  (__clang_minor__ < 3))
"""
    assert read_host_config(text, "12.4") == Bounds("12.4", gcc=13, clang=17)


def test_a_host_config_that_says_it_another_way_is_refused() -> None:
    with pytest.raises(BuildError, match=r"CUDA 14\.0"):
        read_host_config("#if GCC_VERSION > 1700\n", "14.0")


def test_a_torch_without_the_table_is_refused() -> None:
    with pytest.raises(BuildError, match="no table CUDA_CLANG_VERSIONS"):
        make_patch("9.0.0", _CPP_EXTENSION.replace("CUDA_CLANG_VERSIONS", "CLANGS"), _BOUNDS)


@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda p: str(p.name))
def test_every_torch_patch_adds_11_8_with_the_recorded_bounds(folder: Path) -> None:
    bounds = {b.cuda: b for b in read_bounds(_ROOT / "patches/torch/bounds.toml")}
    (patch,) = folder.glob("0001-*.patch")
    added = [line[1:].strip() for line in patch.read_text().splitlines() if line.startswith("+    '11.8'")]
    assert added == [
        f"'11.8': ((6, 0, 0), ({bounds['11.8'].gcc + 1}, 0)),",
        f"'11.8': (MINIMUM_CLANG_VERSION, ({bounds['11.8'].clang + 1}, 0)),",
    ]


def test_every_torch_of_the_matrix_has_a_patch() -> None:
    from ssm_forge.manifest import variants

    minors = {path.name.rpartition(".")[0] for path in _FOLDERS}
    matrix = variants.load(_ROOT / "recipes/variants.yaml")
    assert {variant.torch for variant in matrix.variants} <= minors
