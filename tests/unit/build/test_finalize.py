"""A finished package says what it is, and nothing about where or when it was made."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from conda_channel import make_package
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import BuildError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.base.platforms import LINUX_AARCH64
from ssm_forge.build.finalize import finalize
from ssm_forge.manifest import recipe, variants
from ssm_forge.package import libraries as elf
from ssm_forge.package.read import provenance
from ssm_forge.package.write import EPOCH, InfoFiles, dump_json, read_info, read_json, rewrite_info

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc on this machine to make a library with")

VARIANT = variants.load(workspace().variants).get("cu130", "bridge")
KEY = VARIANT.key("3.12", ArchList.parse("8.0;9.0+PTX"))
RENDERED = recipe.render("causal-conv1d", KEY, workspace())
SITE = "lib/python3.12/site-packages"


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """This workspace's recipes, another cache."""
    return Workspace(workspace().root, tmp_path / "cache")


@pytest.fixture(autouse=True)
def _gpu_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elf, "gpu_code", lambda path: ArchList.parse("8.0;9.0+PTX"))


def built(
    folder: Path,
    *,
    when: int,
    where: str,
    extension: str = "causal_conv1d_cuda",
    flags: tuple[str, ...] = (),
    more: bytes = b"",
) -> Path:
    """A package as the engine leaves it: with the time, the channel and the recipe's folder in it."""
    out = folder / "out"
    content = folder / "content"
    (content / SITE).mkdir(parents=True)
    code = b'#include <stdlib.h>\nint f(void) { return atoi(getenv("X")); }' + more
    library = content / SITE / f"{extension}.so.x.so"
    subprocess.run(["gcc", "-shared", "-fPIC", *flags, "-x", "c", "-", "-o", library], input=code, check=True)
    from rattler_build import assemble_package

    made = assemble_package(
        name="causal-conv1d",
        version="1.0",
        target_platform="linux-64",
        build_string="0",
        output_dir=str(out / "raw"),
        files_dir=str(content),
        depends=["python", "__glibc >=2.99"],
    )

    def stain(files: InfoFiles) -> InfoFiles:
        index = json.loads(files["info/index.json"])
        index["timestamp"] = when
        about = {"channels": [where], "license": "MIT"}
        recipe_file = {"info/recipe/recipe.yaml": where.encode()}
        return {**files, "info/index.json": dump_json(index), "info/about.json": dump_json(about), **recipe_file}

    target = out / "linux-64" / Path(made.path).name
    target.parent.mkdir()
    rewrite_info(Path(made.path), target, stain)
    return target


def test_time_channel_and_folder_are_gone(tmp_path: Path, place: Workspace) -> None:
    finished = finalize(built(tmp_path / "a", when=1, where="file:///secret"), RENDERED, KEY, place)
    files = read_info(finished)
    assert read_json(finished, "index.json")["timestamp"] == EPOCH * 1000
    assert not [name for name in files if name.startswith("info/recipe/")]
    assert b"/secret" not in b"".join(files.values())
    assert read_json(finished, "about.json")["license"] == "MIT"


def test_two_builds_at_other_times_and_places_give_the_same_info(tmp_path: Path, place: Workspace) -> None:
    one = finalize(built(tmp_path / "a", when=1, where="file:///one"), RENDERED, KEY, place)
    two = finalize(built(tmp_path / "b", when=2, where="file:///two"), RENDERED, KEY, place)
    assert read_info(one) == read_info(two)


def test_the_glibc_declared_is_the_one_the_binary_needs(tmp_path: Path, place: Workspace) -> None:
    package = built(tmp_path / "a", when=1, where="x")
    library = next((tmp_path / "a/content" / SITE).glob("*.so"))
    finished = finalize(package, RENDERED, KEY, place)
    declared = [spec for spec in read_json(finished, "index.json")["depends"] if spec.startswith("__glibc")]
    assert declared == [f"__glibc >={elf.read(library).glibc},<3.0.a0"]


def test_the_package_says_what_it_was_made_from(tmp_path: Path, place: Workspace) -> None:
    finished = finalize(built(tmp_path / "a", when=1, where="x"), RENDERED, KEY, place)
    said = provenance(finished)
    assert said["name"] == "causal-conv1d"
    assert said["recipe_sha256"] == recipe.digest("causal-conv1d", place)
    assert said["cuda_arch_list"] == "8.0;9.0+PTX"
    assert said["variant"]["cuda_compiler_version"] == "13.0"
    assert {item["role"] for item in said["materials"]} == {"source", "patch", "toolchain lock"}
    bill = read_json(finished, "sbom.cdx.json")
    assert bill["metadata"]["component"]["name"] == read_json(finished, "index.json")["name"]
    assert {item["sha256"] for item in said["materials"] if item["role"] == "source"} <= {
        content["content"] for item in bill["components"] for content in item.get("hashes", [])
    }


def test_a_package_made_elsewhere_has_no_provenance(tmp_path: Path) -> None:
    assert provenance(make_package(tmp_path / "channel", "demo", {"a": "b"})) == {}


def test_a_package_without_its_extension_is_refused(tmp_path: Path, place: Workspace) -> None:
    package = built(tmp_path / "a", when=1, where="x", extension="other")
    with pytest.raises(BuildError, match="causal-conv1d was built without causal_conv1d_cuda"):
        finalize(package, RENDERED, KEY, place)


@pytest.mark.parametrize("found", [ArchList.parse("8.0"), ArchList.parse("8.0;9.0")])
def test_other_gpu_code_than_asked_for_is_refused(
    found: ArchList, tmp_path: Path, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elf, "gpu_code", lambda path: found)
    package = built(tmp_path / "a", when=1, where="x")
    with pytest.raises(BuildError, match=f"holds {found.tag}, but sm80_sm90ptx was asked for"):
        finalize(package, RENDERED, KEY, place)


@pytest.mark.parametrize("words", ["sequences shorter than 2^31 - 1025", "something else"])
def test_upstreams_kernels_are_recorded_and_ours_under_their_name_are_refused(
    words: str, tmp_path: Path, place: Workspace
) -> None:
    key = KEY.with_kernels("upstream")
    rendered = recipe.render("causal-conv1d", key, workspace())
    said = f'const char *said = "only supports {words}";'.encode()
    package = built(tmp_path, when=1, where="x", more=said)
    if "2^31" in words:
        with pytest.raises(BuildError, match="holds kernels of this project, but upstream's were asked for"):
            finalize(package, rendered, key, place)
        return
    told = provenance(finalize(package, rendered, key, place))
    assert (told["kernels"], told["variant"]["forge_kernels"]) == ("upstream", "upstream")
    patches = [item["uri"].rpartition("/")[2] for item in told["materials"] if item["role"] == "patch"]
    assert "0008-64-bit-offsets.patch" not in patches
    assert "0001-always-build.patch" in patches
    ours = provenance(finalize(built(tmp_path / "ours", when=1, where="x"), RENDERED, KEY, place))
    assert "kernels" not in ours


def test_an_extension_for_another_machine_is_refused_with_both(tmp_path: Path, place: Workspace) -> None:
    package = built(tmp_path, when=1, where="file:///c")
    key = VARIANT.key("3.12", ArchList.parse("8.0;9.0+PTX"), platform=LINUX_AARCH64)
    with pytest.raises(BuildError, match=r"causal_conv1d_cuda\S* is for x86-64, and the package is for aarch64"):
        finalize(package, RENDERED, key, place)


def test_an_extension_that_looks_for_libraries_in_the_build_is_refused(tmp_path: Path, place: Workspace) -> None:
    package = built(tmp_path, when=1, where="x", flags=("-Wl,-rpath,.host/lib",))
    with pytest.raises(BuildError, match=r"would look for libraries in \.host/lib"):
        finalize(package, RENDERED, KEY, place)
    finalize(built(tmp_path / "good", when=1, where="x", flags=("-Wl,-rpath,$ORIGIN/x",)), RENDERED, KEY, place)


def test_the_digest_follows_recipe_and_patches(tmp_path: Path) -> None:
    for folder in ("recipes/demo", "recipes/common", "patches/demo"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text(folder)
    digests = set()
    for number, changed in enumerate(
        ["", "recipes/demo/file", "recipes/common/file", "patches/demo/file", "patches/demo/new"]
    ):
        if changed:
            (tmp_path / changed).write_text(f"{number}")
        recipe.digest.cache_clear()
        digests.add(recipe.digest("demo", Workspace(tmp_path, tmp_path)))
    recipe.digest.cache_clear()
    assert len(digests) == 5


def test_what_pixi_has_beside_a_recipe_is_no_part_of_the_digest(tmp_path: Path) -> None:
    (tmp_path / "recipes/demo/.pixi/bld").mkdir(parents=True)
    (tmp_path / "recipes/demo/recipe.yaml").touch()
    place = Workspace(tmp_path / "", tmp_path)
    before = recipe.digest("demo", place)
    for name in ("recipes/demo/pixi.toml", "recipes/demo/pixi.lock", "recipes/demo/.pixi/bld/x", "recipes/pixi.toml"):
        (tmp_path / name).touch()
    recipe.digest.cache_clear()
    assert recipe.digest("demo", place) == before
