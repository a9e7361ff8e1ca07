"""install-mamba under pixi: whether pixi can do what was asked for, and what is taken out of its hands afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ssm_forge.base.arch import ArchList, Capability
from ssm_forge.base.errors import BuildError, InstallError, NetworkError, VerifyError
from ssm_forge.base.machine import Gpu
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import open_log
from ssm_forge.build import origin
from ssm_forge.flow import pixi_kernels, plan, planning
from ssm_forge.flow.pixi_kernels import Kept
from ssm_forge.flow.plan import Options
from ssm_forge.install import marker, pixi, registry
from ssm_forge.manifest import recipe
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.package import libraries as elf
from ssm_forge.package.read import provenance
from ssm_forge.package.write import read_json
from ssm_forge.solve import source_packages

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy of the checkout, started by pixi on a machine with a network and no GPU."""
    for name in ("recipes", "patches"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".pixi", "__pycache__", "bridge"))
    for name in ("pixi.toml", "pixi.lock"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setenv("PIXI_EXE", "/nowhere/pixi")
    monkeypatch.setenv("SSM_FORGE_CCACHE", "off")
    monkeypatch.delenv("SSM_FORGE_TRUST", raising=False)
    monkeypatch.setattr(origin, "conda_reachable", lambda: True)
    monkeypatch.setattr(pixi_kernels.machine, "gpus", lambda: ())
    monkeypatch.setattr(pixi, "machine_virtual_packages", virtual_packages)
    return Workspace(tmp_path, tmp_path / "cache")


def choose(options: Options, place: Workspace) -> Kept | None:
    return pixi_kernels.choose(options, planning.choose(options, place), place)


class TestChoice:
    def test_the_locked_environment_is_pixis(self, place: Workspace) -> None:
        kept = choose(Options(), place)
        assert kept is not None
        assert kept.prefix == place.recipes / ".pixi/envs/cu130"
        assert (kept.variant, kept.python, kept.cuda, str(kept.archs)) == ("cu130", "3.12", "13.0", "8.0;9.0+PTX")
        assert [source.name for source in kept.locked.sources] == list(PROJECTS)

    @pytest.mark.parametrize(
        "wishes",
        [
            {"cuda_arch": "9.0"},
            {"python": "3.13"},
            {"prefix": Path("elsewhere")},
            {"source": "bridge"},
            {"channels": ("https://example.org/lab",)},
            {"host_compiler": "system"},
            {"variant": "cu124"},
        ],
    )
    def test_what_no_lock_holds_goes_through_the_own_engine(self, place: Workspace, wishes: dict[str, object]) -> None:
        assert choose(replace(Options(), **wishes), place) is None  # type: ignore[arg-type]

    def test_without_pixi_or_a_network_or_with_a_space_in_the_path_too(
        self, place: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with monkeypatch.context() as without:
            without.delenv("PIXI_EXE")
            assert choose(Options(), place) is None
        with monkeypatch.context() as without:
            without.setattr(origin, "conda_reachable", lambda: False)
            assert choose(Options(), place) is None
        spaced = Workspace(place.root / "a b", place.cache)
        shutil.copytree(place.recipes, spaced.recipes)
        for path in (place.manifest, place.lock):
            shutil.copy(path, spaced.root)
        assert choose(Options(), spaced) is None
        assert "has a space" in " ".join(capsys.readouterr().err.split())

    @pytest.mark.parametrize(("capability", "native"), [("9.0", True), ("8.6", True), ("12.0", False)])
    def test_a_gpu_that_would_compile_ptx_is_named(
        self,
        place: Workspace,
        capability: str,
        native: bool,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        gpu = Gpu("Some GPU", Capability.parse(capability), "580.1")
        monkeypatch.setattr(pixi_kernels.machine, "gpus", lambda: (gpu,))
        assert (choose(Options(), place) is not None) is native
        said = " ".join(capsys.readouterr().err.split())
        assert ("Some GPU (12.0) has no machine code in 8.0;9.0+PTX" in said) is not native

    def test_a_lock_or_manifest_out_of_step_is_an_error(self, place: Workspace) -> None:
        text = place.source_manifest.read_text()
        place.source_manifest.write_text(text.replace('use_ninja = ["1"]', 'use_ninja = ["0"]'))
        with pytest.raises(VerifyError, match="is not what pixi") as caught:
            choose(Options(), place)
        assert caught.value.fix.endswith("lock'.")
        place.source_manifest.write_text(text)
        recipe_file = place.recipes / "mamba-ssm/recipe.yaml"
        recipe_file.write_text(recipe_file.read_text().replace("    - einops\n", "    - einops\n    - nano\n"))
        with pytest.raises(VerifyError, match=r"recipes/pixi\.lock does not fit .* needs 'nano'"):
            choose(Options(), place)


@pytest.fixture
def kept(place: Workspace) -> Kept:
    found = choose(Options(), place)
    assert found is not None
    return found


def fake(place: Workspace, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = place.root / "pixi"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PIXI_EXE", str(program))


def run(kept: Kept, place: Workspace) -> bool:
    with open_log(place.logs, "test") as log:
        return pixi_kernels.install_kept(kept, place, log, jobs=3)


class TestInstall:
    @pytest.fixture
    def built(self, kept: Kept, place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pixi that has built both packages already, and installs them."""
        if shutil.which("gcc") is None:
            pytest.skip("no gcc on this machine to make a library with")
        monkeypatch.setattr(elf, "gpu_code", lambda path: ArchList.parse("8.0;9.0+PTX"))
        for source in kept.locked.sources:
            filename = source_packages.rendered(source, place.source_lock).filename
            library = place.root / f"{source.name}.so"
            subprocess.run(
                ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=b"int f(void) {return 0;}", check=True
            )
            folder = place.root / "made" / source.name
            content = folder.with_name(f"{source.name}-content") / "lib/python3.12/site-packages"
            content.mkdir(parents=True)
            shutil.move(library, content / f"{recipe.EXTENSIONS[source.name]}.so.x.so")
            make = "from rattler_build import assemble_package as a; import sys; n, v, b, o, f = sys.argv[1:]\n"
            make += "print(a(name=n, version=v, target_platform='linux-64', build_string=b, output_dir=o, files_dir=f,"
            make += " depends=['python', 'libgcc >=14', 'libgcc >=14']).path)"
            _, version, build = filename.removesuffix(".conda").rsplit("-", 2)
            words = [source.name, version, build, str(folder), str(content.parents[2])]
            path = subprocess.check_output([sys.executable, "-c", make, *words], text=True).strip().splitlines()[-1]
            artifact = place.recipes / ".pixi/artifacts-v0" / source.name / "key" / filename
            artifact.parent.mkdir(parents=True)
            shutil.move(path, artifact)
            record = {"name": source.name, "version": version, "build": build, "url": artifact.as_uri()}
            meta = kept.prefix / "conda-meta" / f"{filename.removesuffix('.conda')}.json"
            meta.parent.mkdir(parents=True, exist_ok=True)
            meta.write_text(json.dumps(record))
        fake(place, monkeypatch, 'echo "$@; $CONDA_OVERRIDE_CUDA; $CPU_COUNT" >"$(dirname "$0")/told"')

    @pytest.mark.usefixtures("built")
    def test_the_finished_packages_are_in_the_channel_and_the_environment_is_known(
        self, kept: Kept, place: Workspace
    ) -> None:
        assert run(kept, place)
        told = (place.root / "told").read_text()
        assert told == f"install --locked -e cu130 --manifest-path {place.source_manifest}; 13.0; 3\n"
        for source in kept.locked.sources:
            path = place.channel / "linux-64" / source_packages.rendered(source, place.source_lock).filename
            said = provenance(path)
            assert said["recipe_sha256"] == recipe.digest(source.name, place)
            uris = {item["uri"] for item in said["materials"] if item["role"] == "toolchain package"}
            assert uris == {record.url for record in (*source.build, *source.host)}
            depends = read_json(path, "index.json")["depends"]
            assert depends.count("libgcc >=14") == 1
            assert any(spec.startswith("__glibc >=") for spec in depends)
        assert registry.installed_prefixes(place) == [kept.prefix]
        assert marker.is_foreign(kept.prefix)

    @pytest.mark.usefixtures("built")
    def test_a_second_time_nothing_is_taken(self, kept: Kept, place: Workspace) -> None:
        assert run(kept, place)
        files = {path: path.stat().st_mtime_ns for path in place.channel.rglob("*.conda")}
        assert len(files) == 2
        assert run(kept, place)
        assert {path: path.stat().st_mtime_ns for path in place.channel.rglob("*.conda")} == files

    @pytest.mark.usefixtures("built")
    def test_another_package_than_the_locked_one_is_refused(self, kept: Kept, place: Workspace) -> None:
        record = next((kept.prefix / "conda-meta").glob("mamba-ssm-*.json"))
        record.write_text(record.read_text().replace("_h", "_x"))
        with pytest.raises(InstallError, match=r"recipes/pixi\.lock says that it is mamba-ssm-.*_h"):
            run(kept, place)

    @pytest.mark.parametrize(
        "told",
        [
            "Error:   × failed to resolve source package 'mamba-ssm' (at 'mamba-ssm')\n"
            "  ├─▶   × could not initialize the build-backend\n"
            "  ╰─▶ Cannot solve the request because of: No candidates were found for x *.",
            "Error:   × this project requires pixi '>=0.76', but you have pixi 0.60.0\n",
            "Error:   × conda source dependencies are not allowed without enabling the 'pixi-\n  │ build' preview\n",
        ],
        ids=["no backend", "too old", "no pixi-build"],
    )
    def test_a_pixi_that_can_not_build_is_named_and_nothing_is_done(
        self,
        kept: Kept,
        place: Workspace,
        told: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (place.root / "error").write_text(told)
        fake(place, monkeypatch, f"cat {place.root}/error >&2; exit 1")
        assert not run(kept, place)
        assert "the own engine does it" in " ".join(capsys.readouterr().err.split())

    def test_a_build_that_fails_has_the_hint_for_its_last_words(
        self, kept: Kept, place: Workspace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = " ╭─ Running build for recipe: mamba-ssm-2.3.2\n │ │ nvcc: Killed\nError:   × failed to build"
        (place.root / "error").write_text(said)
        fake(place, monkeypatch, f"cat {place.root}/error >&2; exit 1")
        with pytest.raises(BuildError, match="failed to build") as caught:
            run(kept, place)
        assert "--jobs 1" in caught.value.fix

    def test_other_failures_are_what_they_are(
        self, kept: Kept, place: Workspace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake(place, monkeypatch, "echo 'Error:  × failed to download x' >&2; exit 1")
        with pytest.raises(NetworkError, match="failed to download x"):
            run(kept, place)


def test_the_values_are_those_of_the_own_engine(place: Workspace, kept: Kept) -> None:
    """What a package says of its row must not depend on who built it."""
    own = plan.variants.load(place.variants).get("cu130", "conda")
    assert kept.key == own.key("3.12", kept.archs)
