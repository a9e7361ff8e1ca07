from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from packaging.version import Version

from ssm_forge.base.errors import BuildError, IntegrityError, UsageError
from ssm_forge.base.fetch import Artifact
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.base.platforms import Platform
from ssm_forge.bridge.torch_patch import MEMBER, read_bounds
from ssm_forge.manifest import sdists, variants
from ssm_forge.manifest.patching import HunkResult, patched, reapply
from ssm_forge.manifest.recipe import PROJECTS, releases
from ssm_forge.upkeep import parts as bump_parts
from ssm_forge.upkeep import projects as bump
from ssm_forge.upkeep.package_index import Release

_ROOT = Path(__file__).parents[3]

_SETUP = """\
import os

FORCE = os.getenv("FORCE")


def sources():
    return ["csrc/scan.cu"]


NAME = "selective_scan_cuda"
install_requires = [
    "torch",
    "ninja",
]
"""
_PATCH = """\
Why this is.

Upstream: no.

--- a/setup.py
+++ b/setup.py
@@ -1,6 +1,6 @@
 import os
 
-FORCE = os.getenv("FORCE")
+FORCE = True
 
 
 def sources():
@@ -10,5 +10,4 @@
 NAME = "selective_scan_cuda"
 install_requires = [
     "torch",
-    "ninja",
 ]
--- /dev/null
+++ b/csrc/more.cu
@@ -0,0 +1,1 @@
+// more
"""
_RECIPE = """\
source:
  - if: version == "2.0"
    then:
      url: https://old/mamba_ssm-2.0.tar.gz
      sha256: 00
      patches:
        - ../../patches/mamba-ssm/2.0/0001-x.patch
  - if: version == "1.0"
    then:
      url: https://old/mamba_ssm-1.0.tar.gz
      sha256: 11

build:
  number: 0
"""


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A workspace that knows mamba-ssm 2.0 with one patch."""
    found = Workspace(root=tmp_path / "root", cache=tmp_path / "cache")
    write(found.recipes / "mamba-ssm/recipe.yaml", _RECIPE)
    write(found.patches / "mamba-ssm/2.0/0001-x.patch", _PATCH)
    write(found.variants, 'mamba_ssm: ["1.0", "2.0", "2.0"]\n')
    return found


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def release(place: Workspace, *, setup: str = _SETUP, sources: bool = True) -> Release:
    """mamba-ssm 3.0, already downloaded."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, text in {"setup.py": setup, **({"csrc/scan.cu": "//\n"} if sources else {})}.items():
            member = tarfile.TarInfo(f"mamba_ssm-3.0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    digest = hashlib.sha256(data.getvalue()).hexdigest()
    name = "mamba_ssm-3.0.tar.gz"
    (place.downloads / digest).mkdir(parents=True, exist_ok=True)
    (place.downloads / digest / name).write_bytes(data.getvalue())
    return Release(Version("3.0"), Artifact(f"https://new/{name}", digest, 0, name), is_sdist=True)


def snapshot(place: Workspace) -> dict[Path, str]:
    return {path: path.read_text() for path in sorted(place.root.rglob("*")) if path.is_file()}


def test_a_newer_release_updates_recipe_patches_and_matrix(place: Workspace) -> None:
    newer = release(place, setup="# moved\n# down\n" + _SETUP)
    update = bump.update_project("mamba-ssm", "2.0", newer, place)
    update.write()
    assert "hunk 1 (line 1) fits, now at line 3" in "\n".join(update.summary)
    patch = (place.patches / "mamba-ssm/3.0/0001-x.patch").read_text()
    assert patch.startswith("Why this is.\n\nUpstream: no.\n\n--- a/setup.py\n")
    assert "@@ -3,6 +3,6 @@" in patch or "@@ -2,7 +2,7 @@" in patch
    assert "--- /dev/null\n+++ b/csrc/more.cu\n" in patch
    recipe = (place.recipes / "mamba-ssm/recipe.yaml").read_text()
    assert f"url: https://new/mamba_ssm-3.0.tar.gz\n      sha256: {newer.artifact.sha256}\n" in recipe
    assert "patches/mamba-ssm/3.0/0001-x.patch" in recipe
    assert '"2.0"' not in recipe
    assert '- if: version == "1.0"' in recipe
    assert place.variants.read_text() == 'mamba_ssm: ["1.0", "3.0", "3.0"]\n'
    assert not (place.patches / "mamba-ssm/2.0/0001-x.patch").exists()


def test_a_patch_that_an_older_release_takes_too_is_kept(place: Workspace) -> None:
    recipe = place.recipes / "mamba-ssm/recipe.yaml"
    shared = "      patches:\n        - ../../patches/mamba-ssm/2.0/0001-x.patch\n"
    write(recipe, _RECIPE.replace("sha256: 11\n", f"sha256: 11\n{shared}"))
    write(place.patches / "mamba-ssm/2.0/0002-y.patch", _NEXT)
    bump.update_project("mamba-ssm", "2.0", release(place), place).write()
    assert (place.patches / "mamba-ssm/2.0/0001-x.patch").exists()
    assert not (place.patches / "mamba-ssm/2.0/0002-y.patch").exists()


def test_the_new_patches_fit_the_new_release(place: Workspace, tmp_path: Path) -> None:
    newer = release(place, setup="# moved\n" + _SETUP)
    bump.update_project("mamba-ssm", "2.0", newer, place).write()
    write(tmp_path / "tree/setup.py", "# moved\n" + _SETUP)
    _, results = reapply([place.patches / "mamba-ssm/3.0/0001-x.patch"], tmp_path / "tree")
    assert results
    assert all(result.found == result.line for result in results)


_NEXT = """\
--- a/setup.py
+++ b/setup.py
@@ -3 +3 @@
-FORCE = True
+FORCE = None
--- a/csrc/more.cu
+++ b/csrc/more.cu
@@ -1 +1,2 @@
 // more
+// and more
"""


def patches(folder: Path, *texts: str) -> list[Path]:
    found = []
    for number, text in enumerate(texts, 1):
        found.append(folder / f"{number:04}-x.patch")
        write(found[-1], text)
    return found


def test_patched_files_are_as_all_patches_together_leave_them(tmp_path: Path) -> None:
    write(tmp_path / "tree/setup.py", "# moved\n" + _SETUP)
    write(tmp_path / "tree/other.py", "kept\n")
    before = {path: path.read_text() for path in (tmp_path / "tree").iterdir()}
    files, results = patched(patches(tmp_path, _PATCH, _NEXT), tmp_path / "tree")
    setup = _SETUP.replace('os.getenv("FORCE")', "None").replace('    "ninja",\n', "")
    assert files == {"setup.py": "# moved\n" + setup, "csrc/more.cu": "// more\n// and more\n"}
    assert [result.found is not None for result in results] == [True] * 5
    # In memory only.
    assert {path: path.read_text() for path in (tmp_path / "tree").iterdir()} == before


def test_patched_is_what_patch_itself_makes_of_the_same_files(tmp_path: Path) -> None:
    if shutil.which("patch") is None:
        pytest.skip("no patch on this machine to compare with")
    write(tmp_path / "tree/setup.py", "# moved\n" + _SETUP)
    files, _ = patched(patches(tmp_path, _PATCH, _NEXT), tmp_path / "tree")
    for path in patches(tmp_path, _PATCH, _NEXT):
        subprocess.run(["patch", "-p1", "-s", "-i", path], cwd=tmp_path / "tree", check=True)
    assert {name: (tmp_path / "tree" / name).read_text() for name in files} == files


def test_patched_tells_what_does_not_fit_and_why(tmp_path: Path) -> None:
    write(tmp_path / "tree/setup.py", _SETUP.replace('    "ninja",\n', ""))
    first, second = patches(tmp_path, _PATCH, _NEXT.replace("FORCE = True", "FORCE = False"))
    _, results = patched([first, second], tmp_path / "tree")
    assert [result for result in results if result.found is None] == [
        HunkResult(first.name, "setup.py", 2, 10, None, "'\"ninja\",' is gone"),
        HunkResult(second.name, "setup.py", 1, 3, None, "'FORCE = False' is gone"),
    ]


def test_white_space_that_differs_is_named_as_such(tmp_path: Path) -> None:
    write(tmp_path / "tree/a.py", "def f():\n    x = 1\n    \n    return x\n")
    (patch,) = patches(
        tmp_path, "--- a/a.py\n+++ b/a.py\n@@ -2,3 +2,3 @@\n     x = 1\n \n-    return x\n+    return 2\n"
    )
    (result,) = patched([patch], tmp_path / "tree")[1]
    assert result.reason == "the white space of an empty line differs"


def test_lines_for_an_empty_file_fit_where_it_is_and_a_new_file_where_it_is_not(tmp_path: Path) -> None:
    lines = "@@ -0,0 +1 @@\n+import a\n"
    (into_empty, new) = patches(
        tmp_path, f"--- a/p/__init__.py\n+++ b/p/__init__.py\n{lines}", f"--- /dev/null\n+++ b/q.py\n{lines}"
    )
    write(tmp_path / "tree/p/__init__.py", "")
    files, results = patched([into_empty, new], tmp_path / "tree")
    assert files == {"p/__init__.py": "import a\n", "q.py": "import a\n"}
    assert all(result.found for result in results)
    (tmp_path / "tree/p/__init__.py").unlink()
    write(tmp_path / "tree/q.py", "theirs\n")
    files, results = patched([into_empty, new], tmp_path / "tree")
    assert files == {}
    assert results == [
        HunkResult(into_empty.name, "p/__init__.py", 1, 1, None, "the file is gone"),
        HunkResult(new.name, "q.py", 1, 1, None, "a file of that name is there"),
    ]


def test_what_is_no_patch_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"0001-x\.patch is not a unified diff"):
        patched(patches(tmp_path, "Why this is.\n"), tmp_path)


def test_an_sdist_is_unpacked_and_its_top_folder_returned(place: Workspace, tmp_path: Path) -> None:
    top = sdists.unpack(release(place).artifact, tmp_path / "new/folder", place)
    assert top == tmp_path / "new/folder/mamba_ssm-3.0"
    assert (top / "setup.py").read_text() == _SETUP
    assert (top / "csrc/scan.cu").read_text() == "//\n"


def test_a_damaged_sdist_in_the_cache_is_refused_and_nothing_of_it_is_unpacked(
    place: Workspace, tmp_path: Path
) -> None:
    artifact = release(place).artifact
    damaged = release(place, setup=_SETUP + "import evil\n").artifact
    shutil.copy(place.downloads / damaged.sha256 / damaged.name, place.downloads / artifact.sha256 / artifact.name)
    with pytest.raises(IntegrityError, match="the lock says"):
        sdists.unpack(artifact, tmp_path / "folder", place)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("project", PROJECTS)
def test_every_release_is_found_where_its_recipe_takes_it_from(project: str) -> None:
    here = workspace()
    text = (here.recipes / project / "recipe.yaml").read_text(encoding="utf-8")
    assert {row.projects[project] for row in variants.load(here.variants).variants} <= set(releases(project, here))
    for version in releases(project, here):
        found = sdists.find(project, version, here)
        assert found.name == f"{project.replace('-', '_')}-{version}.tar.gz"
        assert found.url.endswith(f"/{found.name}")
        assert f"url: {found.url}\n      sha256: {found.sha256}\n" in text


def test_a_version_that_no_recipe_builds_is_refused_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"no recipe here builds mamba-ssm 0\.1; they build 2\.[\d.]+"):
        sdists.find("mamba-ssm", "0.1", workspace())


def test_a_patch_that_no_longer_fits_is_reported_hunk_by_hunk_and_nothing_is_written(place: Workspace) -> None:
    before = snapshot(place)
    newer = release(place, setup=_SETUP.replace('    "ninja",\n', ""))
    with pytest.raises(BuildError) as caught:
        bump.update_project("mamba-ssm", "2.0", newer, place).write()
    assert "1 of 3 hunks of patches/mamba-ssm/2.0 do not fit mamba-ssm 3.0" in str(caught.value)
    assert "0001-x.patch: setup.py, hunk 2 (line 10) does not fit: '\"ninja\",' is gone" in str(caught.value)
    assert snapshot(place) == before


def test_a_hunk_that_fits_at_two_places_is_no_fit(place: Workspace) -> None:
    newer = release(place, setup="#\n" + _SETUP + _SETUP)
    with pytest.raises(BuildError, match="it fits at 2 places"):
        bump.update_project("mamba-ssm", "2.0", newer, place)


def test_a_release_that_drops_the_kernels_is_refused_by_file(place: Workspace) -> None:
    newer = release(place, setup=_SETUP.replace("selective_scan_cuda", "selective_scan_triton"))
    with pytest.raises(BuildError, match=r"setup\.py of mamba-ssm 3\.0 does not build selective_scan_cuda"):
        bump.update_project("mamba-ssm", "2.0", newer, place)


def test_a_source_archive_without_csrc_is_refused(place: Workspace) -> None:
    with pytest.raises(BuildError, match="no CUDA sources under csrc"):
        bump.update_project("mamba-ssm", "2.0", release(place, sources=False), place)


def test_patches_written_by_hand_for_the_new_release_are_used(place: Workspace) -> None:
    setup = _SETUP.replace('    "ninja",\n', "")
    by_hand = _PATCH[: _PATCH.index("@@ -10")]
    write(place.patches / "mamba-ssm/3.0/0001-x.patch", by_hand)
    bump.update_project("mamba-ssm", "2.0", release(place, setup=setup), place).write()
    assert place.variants.read_text() == 'mamba_ssm: ["1.0", "3.0", "3.0"]\n'


def test_the_bounds_file_is_in_the_form_that_the_refresh_writes() -> None:
    path = _ROOT / "patches/torch/bounds.toml"
    assert bump_parts.bounds_text(list(read_bounds(path))) == path.read_text()


def torch_release(version: str) -> Release:
    name = f"torch-{version}-cp312-cp312-manylinux_2_28_x86_64.whl"
    return Release(Version(version), Artifact(f"https://x/{name}", "0", 0, name), is_sdist=False)


_TABLES = """\
CUDA_GCC_VERSIONS: VersionMap = {
    '11.7': ((6, 0, 0), (12, 0)),
}
CUDA_CLANG_VERSIONS: VersionMap = {
    '11.7': (MINIMUM_CLANG_VERSION, (14, 0)),
}
"""


@pytest.fixture
def torch_place(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace whose matrix is this project's, and an index with one release for each of its torch minors."""
    place.variants.unlink()
    shutil.copy(_ROOT / "recipes/variants.yaml", place.variants)
    shutil.copytree(_ROOT / "patches/torch", place.patches / "torch")
    have = [path.name for path in (_ROOT / "patches/torch").iterdir() if path.is_dir()]
    listing = {"torch": sorted((torch_release(v) for v in have), key=lambda r: r.version), "nvidia-cuda-crt": []}
    monkeypatch.setattr(bump_parts, "releases", lambda project, workspace: listing[project])
    return place


def test_a_torch_whose_table_changed_is_refused_by_file_and_table(
    torch_place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(torch_place)
    changed = _TABLES.replace("CUDA_CLANG_VERSIONS: VersionMap", "CLANG_VERSIONS")
    monkeypatch.setattr(bump_parts, "read_member", lambda url, member: changed.encode())
    with pytest.raises(BuildError, match=rf"{MEMBER} of torch [\d.]+ has no table CUDA_CLANG_VERSIONS"):
        bump_parts.bump_torch(torch_place)
    assert snapshot(torch_place) == before


def test_a_further_torch_patch_that_no_longer_fits_is_named_by_file_and_hunk(
    torch_place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bump_parts, "read_member", lambda url, member: _TABLES.encode())
    with pytest.raises(BuildError, match=r"0002-nvcc-from-the-environment\.patch: \S+cpp_extension\.py, hunk 1"):
        bump_parts.bump_torch(torch_place)


def test_locks_of_another_platform_are_solved_with_the_versions_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[tuple[str, str, str], str] = {}

    def compiled(source: Path, python: str, alone: bool, platform: Platform, pins: str, place: Workspace) -> str:
        asked[source.name, python, platform.subdir] = pins
        return f'[[packages]]\nname = "torch"\nversion = "2.{len(pins)}"\n'

    monkeypatch.setattr(bump_parts, "_compiled", compiled)
    place = Workspace(root=tmp_path, cache=tmp_path / "cache")
    place.bridge_locks.mkdir(parents=True)
    shutil.copy(workspace().variants, place.variants)
    update = bump_parts.bump_bridge(place)
    written = {path.name for path in update.files}
    assert {"pylock.cu130-py311.toml", "pylock.cu130-linux-aarch64-py311.toml", "pylock.tools-old.toml"} <= written
    assert not any("cu118-linux-aarch64" in name for name in written)
    assert asked["cu130.in", "3.11", "linux-64"] == ""
    assert asked["cu130.in", "3.11", "linux-aarch64"] == "torch==2.0\n"
    assert asked["cu130-toolkit.in", "3.10", "linux-aarch64"] == "torch==2.0\n"
