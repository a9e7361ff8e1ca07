"""Source trees: read without running them, refused where they can't be built, compiled for what was asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import BuildError, IntegrityError, NetworkError, UsageError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import workspace
from ssm_forge.build import run as building
from ssm_forge.build.make_wheel import make
from ssm_forge.build.request import BuildRequest
from ssm_forge.commands.install_mamba import install_mamba
from ssm_forge.manifest import recipe, variants
from ssm_forge.package import libraries as elf
from ssm_forge.package import read as inspection
from ssm_forge.package import read_wheel as read
from ssm_forge.trees import build as trees
from ssm_forge.trees import install as installing
from ssm_forge.trees import source
from ssm_forge.trees.recipe import apply_known_patches, loads, write
from wheel_packages import LIBRARY, kernels

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "recipes" / "source-tree"
SETUP = """\
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CUDAExtension
NAME = "mamba_ssm"
setup(name=NAME, version=get_version(), install_requires=["torch", "einops", "ninja", 'pytest; extra == "dev"'],
      ext_modules=[CUDAExtension("selective_scan_cuda", ["csrc/scan.cpp", "csrc/scan_kernel.cu"])])
"""


def make_tree(folder: Path, **files: str) -> Path:
    """A fork of mamba-ssm in small; ``files`` by path with ``__`` for ``/`` and ``_dot_`` for a dot; "" removes one."""
    contents = {
        "setup.py": SETUP,
        "mamba_ssm/__init__.py": '__version__ = "1.1.1"\n',
        "csrc/scan.cpp": "// binding\n",
        "csrc/scan_kernel.cu": "// bimamba_type\n",
        **{name.replace("__", "/").replace("_dot_", "."): text for name, text in files.items()},
    }
    for name, text in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text:
            path.write_text(text, encoding="utf-8")
        else:
            path.unlink(missing_ok=True)
    return folder


def test_a_folder_says_its_name_version_and_requirements_without_being_run(tmp_path: Path) -> None:
    tree = source.get(str(make_tree(tmp_path / "Vim")), tmp_path / "work" / "tree")
    assert (tree.name, tree.version, tree.origin, tree.commit) == ("mamba-ssm", "1.1.1", "Vim", "")
    assert [r.name for r in tree.requires] == ["torch", "einops", "ninja"]
    assert tree.sources == ("csrc/scan_kernel.cu",)
    assert (tree.folder / "csrc/scan_kernel.cu").read_text() == "// bimamba_type\n"
    assert [path.name for path in tree.folder.parent.iterdir()] == ["tree"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"setup_dot_py": SETUP.replace("get_version()", '"2.0+cu118"')}, ("mamba-ssm", "2.0")),
        ({"pyproject_dot_toml": '[project]\nname = "other_scan"\nversion = "3.1"\n'}, ("other-scan", "3.1")),
        ({"PKG-INFO": "Metadata-Version: 2.1\nName: sdist-scan\nVersion: 1.0.2\n"}, ("sdist-scan", "1.0.2")),
        ({"mamba_ssm____init___dot_py": ""}, ("mamba-ssm", "0")),
    ],
)
def test_the_name_and_version_are_found_where_projects_write_them(
    tmp_path: Path, files: dict[str, str], told: tuple[str, str]
) -> None:
    folder = make_tree(tmp_path / "a", **{k: v for k, v in files.items() if "____init__" not in k})
    if told[1] == "0":
        (folder / "mamba_ssm/__init__.py").unlink()
    tree = source.get(str(folder), tmp_path / "work" / "tree")
    assert (tree.name, tree.version) == told


def archives(folder: Path, target: Path) -> list[Path]:
    made = [target / "scan-1.tar.gz", target / "scan-1.zip"]
    with tarfile.open(made[0], "w:gz") as tar:
        tar.add(folder, "scan-1")
    with zipfile.ZipFile(made[1], "w") as archive:
        for path in source.files(folder):
            archive.write(path, f"scan-1/{path.relative_to(folder)}")
    return made


def test_a_folder_and_archives_of_it_are_the_same_tree(tmp_path: Path) -> None:
    folder = make_tree(tmp_path / "scan")
    before = source.get(str(folder), tmp_path / "work" / "0").sha256
    for path in ("build/temp.linux/scan_kernel.o", "__pycache__/setup.pyc", "selective_scan_cuda.so"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("of an earlier build")
    assert source.get(str(folder), tmp_path / "work" / "1").sha256 == before
    for number, file in enumerate(archives(folder, tmp_path)):
        tree = source.get(f"{file}#sha256={sha256_of(file)}", tmp_path / "work" / f"a{number}")
        assert tree.sha256 == before
        assert tree.origin == f"{file.name}#sha256={sha256_of(file)}"
    (folder / "csrc/scan_kernel.cu").write_text("// changed\n")
    assert source.get(str(folder), tmp_path / "work" / "2").sha256 != before


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_a_git_repository_gives_the_commit(tmp_path: Path) -> None:
    folder = make_tree(tmp_path / "repo" / "kernels" / "scan")
    git(tmp_path / "repo", "init", "--quiet", "-b", "main")
    git(tmp_path / "repo", "add", ".")
    git(tmp_path / "repo", "commit", "--quiet", "-m", "one")
    head = git(tmp_path / "repo", "rev-parse", "HEAD").strip()
    tree = source.get(str(folder), tmp_path / "work" / "0")
    assert tree.commit == head
    url = f"git+{(tmp_path / 'repo').as_uri()}@main#subdirectory=kernels/scan"
    cloned = source.get(url, tmp_path / "work" / "1")
    assert (cloned.commit, cloned.sha256) == (head, tree.sha256)
    (folder / "setup.py").write_text(SETUP + "# mine\n")
    assert source.get(str(folder), tmp_path / "work" / "2").commit == f"{head}-dirty"
    with pytest.raises(NetworkError, match="can't be cloned"):
        source.get(f"git+{(tmp_path / 'repo').as_uri()}@nowhere", tmp_path / "work" / "3")


@pytest.mark.parametrize(
    ("url", "address", "revision"),
    [
        ("https://example.org/a/b", "https://example.org/a/b", "HEAD"),
        ("https://example.org/a/b.git@v1.1.1", "https://example.org/a/b.git", "v1.1.1"),
        ("https://example.org/a/b@feature/scan", "https://example.org/a/b", "feature/scan"),
        ("ssh://git@example.org/a/b", "ssh://git@example.org/a/b", "HEAD"),
        ("ssh://git@example.org/a/b@main", "ssh://git@example.org/a/b", "main"),
        ("git@example.org:a/b", "git@example.org:a/b", "HEAD"),
        ("git@example.org:a/b@main", "git@example.org:a/b", "main"),
        ("/srv/a/b@main", "/srv/a/b", "main"),
    ],
)
def test_a_revision_follows_the_path_and_may_have_a_slash(url: str, address: str, revision: str) -> None:
    assert source._revision(url) == (address, revision)


@pytest.mark.parametrize("address", ["git+--upload-pack=touch OUT", "git+file://REPO@--detach"])
def test_an_address_is_no_option_of_git(tmp_path: Path, address: str) -> None:
    git(make_tree(tmp_path / "repo"), "init", "--quiet", "-b", "main")
    words = address.replace("OUT", str(tmp_path / "ran")).replace("REPO", str(tmp_path / "repo"))
    with pytest.raises((NetworkError, UsageError)):
        source.get(words, tmp_path / "work" / "tree")
    assert not (tmp_path / "ran").exists()


MODULES = '[submodule "a"]\n\tpath = 3rdparty/cutlass\n\turl = https://example.org/a\n'


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"setup_dot_py": "", "kernels__scan__setup_dot_py": SETUP}, "has no setup.py"),
        ({"csrc__scan_kernel_dot_cu": ""}, "has no CUDA sources"),
        ({"setup_dot_py": "from setuptools import setup\nsetup(name='x')\n"}, "builds no CUDAExtension"),
        ({"setup_dot_py": SETUP.replace("NAME,", "name(),")}, "does not say its name"),
        ({"_dot_gitmodules": MODULES, "setup_dot_py": SETUP + "'3rdparty/cutlass/include'\n"}, "submodule 3rdparty"),
    ],
)
def test_a_tree_that_cant_be_built_is_refused_at_once(tmp_path: Path, files: dict[str, str], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        source.get(str(make_tree(tmp_path / "a", **files)), tmp_path / "work" / "tree")
    if what == "has no setup.py":
        assert caught.value.fix == "It has one in kernels/scan: name that folder."


def test_a_submodule_that_the_build_does_not_name_is_no_obstacle(tmp_path: Path) -> None:
    folder = make_tree(tmp_path / "a", _dot_gitmodules=MODULES)
    tree = source.get(str(folder), tmp_path / "work" / "tree")
    assert source.missing_submodules(tree.folder) == ["3rdparty/cutlass"]


def test_what_is_not_there_or_leads_out_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "work" / "tree"
    with pytest.raises(UsageError, match="is neither a folder nor an archive"):
        source.get(str(tmp_path / "nowhere"), target)
    folder = make_tree(tmp_path / "a")
    (folder / "csrc/passwd").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match="has a link csrc/passwd that leads out"):
        source.get(str(folder), target)
    (file, _) = archives(make_tree(tmp_path / "b"), tmp_path)
    with pytest.raises(IntegrityError, match="has sha256"):
        source.get(f"{file}#sha256={'0' * 64}", tmp_path / "work" / "2")
    with pytest.raises(UsageError, match="has no folder"):
        source.get(f"{file}#subdirectory=../..", tmp_path / "work" / "3")
    with pytest.raises(UsageError, match="command lines are no place"):
        source.get("https://me:secret@example.org/a.tar.gz", target)


# --- the compiler's options -------------------------------------------------------------------------------------------


def passed_on(kind: str, *arguments: str, archs: str = "8.0;9.0+PTX") -> list[str]:
    settings = {**os.environ, "TORCH_CUDA_ARCH_LIST": archs, "COMPILED": os.devnull, "CXX_STANDARD": "17"}
    settings["SRC_DIR"] = str(ROOT)
    command = [SCRIPTS / "own_flags.sh", kind, "/usr/bin/printf", "%s\n", *arguments]
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout.splitlines()


OURS = [
    *("-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90"),
    *("-gencode", "arch=compute_90,code=compute_90", "--threads", "1"),
]


@pytest.mark.parametrize(
    "theirs",
    [
        ["-gencode", "arch=compute_70,code=sm_70", "-gencode=arch=compute_75,code=sm_75", "--threads", "4"],
        ["--generate-code=arch=compute_75,code=[compute_75,sm_75]", "--threads=4", "-lineinfo", "-t", "8"],
        ["-arch=sm_86", "-code", "sm_86", "--gpu-architecture", "sm_86", "--generate-line-info", "-t=2"],
        ["--std=c++14", "-arch=native", "--std", "gnu++11", "-split-compile=0", "-code=sm_80"],
    ],
)
def test_capabilities_threads_and_line_information_are_ours_whatever_setup_py_says(theirs: list[str]) -> None:
    found = passed_on("nvcc", "-c", "a b.cu", "-O3", *theirs, "-DX=-arch", "-std=c++14")
    assert found == ["-c", "a b.cu", "-O3", "-DX=-arch", "-std=c++17", *OURS]


def test_of_the_cpp_compiler_only_a_too_old_standard_changes() -> None:
    found = passed_on("g++", "-c", "a.cpp", "-std=c++14", "-lineinfo", "-std=c++20")
    assert found == ["-c", "a.cpp", "-std=c++17", "-lineinfo", "-std=c++20"]


@pytest.mark.parametrize(("theirs", "ours"), [("c++20", "c++20"), ("gnu++14", "c++17"), ("c++17", "c++17")])
def test_a_standard_that_is_newer_than_what_torch_needs_stays(theirs: str, ours: str) -> None:
    assert passed_on("nvcc", "-c", "a.cu", f"-std={theirs}") == ["-c", "a.cu", f"-std={ours}", *OURS]
    assert passed_on("nvcc", "-c", "a.cu") == ["-c", "a.cu", *OURS]
    assert passed_on("g++", "-c", "a.cpp", f"-std={theirs}") == ["-c", "a.cpp", f"-std={ours}"]


@pytest.mark.parametrize("kind", ["nvcc", "g++"])
def test_where_the_sources_are_does_not_get_into_a_library(kind: str) -> None:
    assert passed_on(kind, f"-I{ROOT}", "-c", "a.cpp")[:3] == ["-I.", "-c", "a.cpp"]


def test_the_script_takes_the_set_up_of_the_toolchain_from_the_recipes_own() -> None:
    """The line that it looks for is there once, before pip runs."""
    text = (ROOT / "recipes/common/build.sh").read_text()
    start = text.index("\n# The wheel is unpacked at once")
    assert text.count("\n# The wheel is unpacked at once") == 1
    assert "-m pip install" in text[start:]
    assert all(word in text[:start] for word in (".tools/nvcc", ".tools/g++", "PYTORCH_NVCC", "patch_torch.py"))


# --- what a setup.py may not do ---------------------------------------------------------------------------------------


def guarded(folder: Path, program: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """A Python as a build runs it: what it did, and what was noted."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    site = folder / "site" / "torch" / "cuda"
    site.mkdir(parents=True, exist_ok=True)
    (site.parent / "__init__.py").write_text("from . import cuda\n")
    (site / "__init__.py").write_text("def get_device_capability(device=None):\n    raise RuntimeError('no GPU')\n")
    settings = {
        **os.environ,
        "PYTHONPATH": f"{SCRIPTS / 'guard'}:{folder / 'site'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "GUARD_FOLDERS": str(work),
        "GUARD_REPORT": str(work / "guard.txt"),
        "GUARD_CAPABILITY": "9.0",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=settings, cwd=work, capture_output=True, text=True, check=False
    )
    report = work / "guard.txt"
    return done, report.read_text() if report.exists() else ""


@pytest.mark.parametrize(
    "program",
    [
        "open('OUT/x', 'w')",
        "open('../x', 'ab')",
        "import os; os.open('OUT/x', os.O_CREAT | os.O_WRONLY)",
        "import os; os.mkdir('OUT/d')",
        "import os; open('in', 'w').close(); os.rename('in', 'OUT/x')",
        "import os; os.remove('OUT/kept')",
        "import os; os.symlink('/etc', 'OUT/x')",
        "import shutil; shutil.rmtree('OUT')",
        "import os; os.symlink('OUT', 'link'); open('link/x', 'w')",
    ],
)
def test_a_setup_py_that_writes_outside_of_its_folder_is_stopped(tmp_path: Path, program: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    done, noted = guarded(tmp_path, program.replace("OUT", str(outside)))
    assert done.returncode == 1
    assert "PermissionError" in done.stderr
    assert noted.startswith(f"write {tmp_path}")
    assert [path.name for path in outside.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    "program",
    [
        "import urllib.request; urllib.request.urlopen('https://example.org/a.whl')",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import subprocess; subprocess.run(['wget', 'https://example.org/a.whl'])",
    ],
)
def test_a_setup_py_that_downloads_finds_no_network(tmp_path: Path, program: str) -> None:
    done, noted = guarded(tmp_path, program)
    assert done.returncode == 1
    assert noted.startswith("network ")


def test_what_a_build_does_in_its_own_folder_goes_on_and_the_gpu_is_the_one_that_is_built_for(tmp_path: Path) -> None:
    program = """
import os, shutil, subprocess, tempfile, torch
os.makedirs("build/lib"); open("build/lib/a", "w").write("x"); os.rename("build", "made"); shutil.rmtree("made")
open(os.devnull, "w").write("x")
subprocess.run(["true"], check=True)
print(torch.cuda.get_device_capability(), torch.cuda.is_available())
"""
    done, noted = guarded(tmp_path, program)
    assert (done.returncode, done.stdout, noted) == (0, "(9, 0) True\n", ""), done.stderr


def test_the_words_of_a_build_that_was_stopped_reach_the_user() -> None:
    words = "setup.py downloads from example.org instead of compiling; a build has no network."
    assert building.hint(f"lines\nerror: {words}\nmore\n") == f"Its {words}"


# --- the recipe, patches, checks --------------------------------------------------------------------------------------


def test_the_recipe_names_the_tree_and_asks_for_the_same_toolchain(tmp_path: Path) -> None:
    place = workspace()
    tree = source.get(str(make_tree(tmp_path / "Vim")), tmp_path / "root" / "tree")
    write(tree, [], place, tmp_path / "root")
    variant = variants.load(place.variants).get("cu130", "bridge")
    key = variant.key("3.12", ArchList.parse("9.0"))
    made = recipe.render("mamba-ssm", key, replace(place, root=tmp_path / "root"))
    ours = recipe.render("mamba-ssm", key, place)
    assert made.filename.startswith(f"mamba-ssm-1.1.1-cuda130_py312_sm90_tree{tree.sha256[:8]}_h")
    needs, usual = recipe.requirements(made), recipe.requirements(ours)
    assert needs["build"] == usual["build"]
    # And the headers that torch's own include.
    assert set(needs["host"]) - set(usual["host"]) == {"libcublas-dev", "libcusolver-dev", "libcusparse-dev"}
    assert set(usual["host"]) <= set(needs["host"])
    assert set(needs["run"]) < set(usual["run"])
    assert "einops" in needs["run"]
    assert not [spec for spec in needs["run"] if spec.startswith(("causal-conv1d", "transformers", "triton"))]
    old = variants.load(place.variants).get("cu118", "bridge").key("3.10", ArchList.parse("8.0"))
    assert (
        "numpy <2"
        in recipe.requirements(recipe.render("mamba-ssm", old, replace(place, root=tmp_path / "root")))["run"]
    )
    digest = recipe.digest("mamba-ssm", replace(place, root=tmp_path / "root"))
    assert digest != recipe.digest("mamba-ssm", place)
    write(tree, ["source-tree/0001-cub-of-cuda-13.patch"], place, tmp_path / "patched")
    assert recipe.digest("mamba-ssm", replace(place, root=tmp_path / "patched")) != digest


def test_our_patches_are_applied_where_they_fit_whole(tmp_path: Path) -> None:
    tree = source.get(str(make_tree(tmp_path / "Vim")), tmp_path / "work" / "tree")
    patches = tmp_path / "patches" / "mamba-ssm" / "2.3.1"
    patches.mkdir(parents=True)
    fits = "why\n\n--- a/csrc/scan_kernel.cu\n+++ b/csrc/scan_kernel.cu\n@@ -1 +1 @@\n-// bimamba_type\n+// mended\n"
    (patches / "0001-fits.patch").write_text(fits)
    (patches / "0002-not.patch").write_text(fits.replace("// bimamba_type", "// another line"))
    half = fits.replace("// bimamba_type", "// mended").replace("+// mended", "+// half")
    (patches / "0003-half.patch").write_text(half + "--- a/gone.py\n+++ b/gone.py\n@@ -1 +1 @@\n-a\n+b\n")
    place = replace(workspace(), root=tmp_path)
    assert apply_known_patches(tree, place) == ["mamba-ssm/2.3.1/0001-fits.patch"]
    assert (tree.folder / "csrc/scan_kernel.cu").read_text() == "// mended\n"
    assert apply_known_patches(replace(tree, name="selective-scan"), place) == []


def test_a_release_with_some_patches_of_its_own_gets_those_of_others_too(tmp_path: Path) -> None:
    tree = source.get(str(make_tree(tmp_path / "Vim")), tmp_path / "work" / "tree")
    text = "why\n\n--- a/csrc/scan_kernel.cu\n+++ b/csrc/scan_kernel.cu\n@@ -1 +1 @@\n-// bimamba_type\n+// own\n"
    for name, what in (
        (f"{tree.version}/0002-scan.patch", text),
        ("2.3.1/0002-scan.patch", text.replace("// own", "// other")),
        ("2.3.1/0003-more.patch", text.replace("// bimamba_type", "// own").replace("+// own", "+// both")),
    ):
        (tmp_path / "patches/mamba-ssm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "patches/mamba-ssm" / name).write_text(what)
    applied = apply_known_patches(tree, replace(workspace(), root=tmp_path))
    assert applied == [f"mamba-ssm/{tree.version}/0002-scan.patch", "mamba-ssm/2.3.1/0003-more.patch"]
    assert (tree.folder / "csrc/scan_kernel.cu").read_text() == "// both\n"


SCAN = """\
template <int LOGICAL_WARP_THREADS> struct WarpReverseScan {
    WarpReverseScan()
        : lane_id(cub::LaneId())
        , warp_id(IS_ARCH_WARP ? 0 : (lane_id / LOGICAL_WARP_THREADS))
            detail::uninitialized_copy(placement_ptr, input);
            cub::CTA_SYNC();
            // Reduce parallelism down to just raking threads
            }
            cub::CTA_SYNC();
            // Grab thread postfix from shared memory
"""


def test_forks_of_old_releases_are_mended_for_cuda_13_whatever_their_name(tmp_path: Path) -> None:
    setup = SETUP.replace('NAME = "mamba_ssm"', 'NAME = "selective_scan"')
    folder = make_tree(tmp_path / "VMamba", setup_dot_py=setup, csrc__selective_scan__reverse_scan_dot_cuh=SCAN)
    tree = source.get(str(folder), tmp_path / "work" / "tree")
    assert tree.name == "selective-scan"
    assert apply_known_patches(tree, workspace()) == ["source-tree/0001-cub-of-cuda-13.patch"]
    text = (tree.folder / "csrc/selective_scan/reverse_scan.cuh").read_text()
    assert "cub::" not in text
    assert text.count("__syncthreads();") == 2


def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archs: str) -> tuple[Path, source.Tree]:
    """A package as the engine leaves it, whose library has code for ``archs``, finished for 9.0."""
    place = workspace()
    # Only nvcc makes what cuobjdump reads.
    monkeypatch.setattr(elf, "gpu_code", lambda path: ArchList.parse(archs))
    built = kernels(tmp_path / "out" / "linux-64", version="1.1.1")
    tree = source.get(str(make_tree(tmp_path / "Vim")), tmp_path / "work" / "tree")
    key = variants.load(place.variants).get("cu130", "bridge").key("3.12", ArchList.parse("9.0"))
    told = {"recipe_sha256": "ab" * 32, "tree": trees.as_record(tree, ["mamba-ssm/2.3.1/0001-fits.patch"])}
    write(tree, [], place, tmp_path / "work")
    rendered = recipe.render(tree.name, key, replace(place, root=tmp_path / "work"))
    request = BuildRequest(rendered, key, ())
    return trees._finish(built, request, told, place), tree


def test_a_finished_package_says_which_tree_it_is_from_and_its_wheel_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, tree = finished(tmp_path, monkeypatch, "9.0")
    told = inspection.provenance(package)
    patches = ["mamba-ssm/2.3.1/0001-fits.patch"]
    assert told["tree"] == {"origin": "Vim", "commit": "", "sha256": tree.sha256, "patches": patches}
    assert told["cuda_arch_list"] == "9.0"
    assert {"uri": "Vim", "sha256": tree.sha256, "role": "source tree"} in told["materials"]
    assert "toolchain lock" in {item["role"] for item in told["materials"]}
    assert trees._is_made_from(package, {"recipe_sha256": "ab" * 32, "tree": told["tree"]})
    assert not trees._is_made_from(package, {"recipe_sha256": "cd" * 32, "tree": told["tree"]})
    made = make(package, tmp_path / "wheels")
    assert read.inspect(made).page == "cu130-torch211-trees"
    assert f"+cu130torch2.11.tree{tree.sha256[:8]}-" in made.name


def test_kernels_for_another_gpu_than_asked_for_are_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match="holds sm80, but sm90 was asked for"):
        finished(tmp_path, monkeypatch, "8.0")
    assert not list((tmp_path / "out").glob("*.conda"))


def test_a_library_without_gpu_code_is_no_kernel(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="was built without any GPU code"):
        trees._check_libraries([Path(sys.executable).resolve()], "scan", ArchList.parse("9.0"))


def test_the_check_after_the_build_loads_every_library(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", loads("pytest")], capture_output=True, text=True, check=False)
    assert done.returncode != 0


def test_modules_that_do_not_import_are_named_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with transformers 5, which lacks what forks of old releases import."""
    site = tmp_path / "site"
    files = {
        "torch.py": "",
        "scan/__init__.py": "from scan.more import gone\n",
        "scan/more.py": "",
        "scan_extra.py": "",
        "scan-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: scan\nVersion: 1.0\n",
        "scan-1.0.dist-info/RECORD": "scan/__init__.py,,\nscan/more.py,,\nscan_extra.py,,\nscan_cuda.so,,\n",
    }
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    # Some library that Python can load.
    shutil.copy(LIBRARY, site / "scan_cuda.so")
    monkeypatch.setattr(installing, "loads", lambda name: "")
    installing._require_loads("scan", Path(sys.executable), site)
    told = " ".join(capsys.readouterr().err.split())
    assert "this module of scan does not import here: scan (ImportError: cannot import name 'gone'" in told
    assert "does not import here: scan_extra" not in told


def test_a_tree_and_a_release_of_the_project_that_it_replaces_are_not_both_installed(tmp_path: Path) -> None:
    tree = str(make_tree(tmp_path / "Vim"))
    done = CliRunner().invoke(install_mamba, ["--source-tree", tree, "--mamba-ssm", "2.3.1", "--dry-run"])
    assert isinstance(done.exception, UsageError)
    assert done.exception.what == "--source-tree is built instead of mamba-ssm."
