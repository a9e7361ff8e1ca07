"""recipes/pixi.toml and its lock: in step with the root and the matrix, read, checked and compared like any lock."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conda_channel import index, make_package, served
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import NetworkError, UsageError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.manifest import environments as manifest
from ssm_forge.manifest import recipe, source_workspace, variants
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.package import intact
from ssm_forge.package.write import rewrite_info
from ssm_forge.solve import lock as locks
from ssm_forge.solve import lock_changes, lock_sources, run_exports
from ssm_forge.solve.pixi_identity import identity, xxh3
from ssm_forge.solve.run_exports import RunExports
from ssm_forge.solve.solver import Request, solve

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ("cu118", "cu129", "cu130")


@pytest.fixture
def copy(tmp_path: Path) -> Workspace:
    """What the two workspaces are made of, in a checkout that may be changed."""
    for name in ("recipes", "patches"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".pixi", "__pycache__"))
    for name in ("pixi.toml", "pixi.lock"):
        shutil.copy(ROOT / name, tmp_path)
    return Workspace(tmp_path, tmp_path / "cache")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def problems(place: Workspace) -> dict[str, list[str]]:
    found = locks.check(manifest.load(place.source_manifest), place.source_lock)
    return {name: [str(problem) for problem in listed] for name, listed in found.items() if listed}


class TestManifest:
    def test_it_is_in_step_with_the_root_and_the_matrix(self) -> None:
        assert source_workspace.check(workspace()) == ""

    @pytest.mark.parametrize(
        ("file", "old", "new"),
        [
            ("pixi.toml", 'ninja = "*"\n# torch 2.3.0', 'ninja = "*"\nnano = "*"\n# torch 2.3.0'),
            ("recipes/variants.yaml", 'nvcc_threads: ["1"]', 'nvcc_threads: ["2"]'),
        ],
    )
    def test_a_change_of_either_is_noticed_and_written(self, copy: Workspace, file: str, old: str, new: str) -> None:
        edit(copy.root / file, old, new)
        variants.load.cache_clear()
        assert "is not what pixi.toml and recipes/variants.yaml say" in source_workspace.check(copy)
        assert source_workspace.write(copy)
        assert not source_workspace.write(copy)
        assert source_workspace.check(copy) == ""

    def test_the_root_needs_no_build_backend(self) -> None:
        """Every command of a workspace with source dependencies does, for all its environments."""
        text = (ROOT / "pixi.toml").read_text()
        assert "preview" not in text
        assert not any(e.sources for e in manifest.load(ROOT / "pixi.toml").environments)

    def test_its_environments_are_the_roots_and_the_kernels(self) -> None:
        root, mine = manifest.load(ROOT / "pixi.toml"), manifest.load(workspace().source_manifest)
        for name in KERNELS:
            own = mine.environment(name)
            assert tuple(source.name for source in own.sources) == PROJECTS
            assert replace(own, sources=()) == root.environment(name)

    @pytest.mark.parametrize("name", KERNELS)
    def test_pixi_builds_the_packages_that_the_own_engine_builds(self, name: str) -> None:
        """The same keys of the matrix give the same build string."""
        place, mine = workspace(), manifest.load(workspace().source_manifest)
        row = variants.load(place.variants).get(name, "conda")
        given = mine.variants[mine.environment(name).platforms[0].name]
        for project in PROJECTS:
            theirs = recipe.render(project, BuildKey.from_renderer(given), place)
            values = row.key(mine.environment(name).python, ArchList.parse(row.default_archs))
            assert theirs.filename == recipe.render(project, values, place).filename

    def test_pixi_watches_what_each_recipe_is_made_of(self) -> None:
        for project in PROJECTS:
            data = manifest.read_toml(ROOT / "recipes" / project / "pixi.toml")
            globs = data["package"]["build"]["config"]["extra-input-globs"]
            assert globs == ["../common/**", f"../../patches/{project}/**", "../../patches/torch/**"]


class TestLock:
    def test_it_pins_the_compilers(self) -> None:
        for environment in locks.read(workspace().source_lock):
            assert [source.name for source in environment.sources] == list(PROJECTS)
            for source in environment.sources:
                build = {r.name.normalized: r for r in source.build}
                nvcc = "cuda-nvcc" if environment.name == "cu118" else "cuda-nvcc_linux-64"
                assert {nvcc, "gxx_linux-64", "gcc_linux-64", "sysroot_linux-64"} <= set(build)
                assert "pytorch" in {r.name.normalized for r in source.host}
                assert all(intact.digest(r)[0] for r in (*source.build, *source.host))

    def test_its_torch_and_those_that_the_kernels_are_built_with_are_one(self) -> None:
        for environment in locks.read(workspace().source_lock):
            torch = next(r.url for r in environment.records if r.name.normalized == "pytorch")
            for source in environment.sources:
                assert torch in {r.url for r in source.host}

    def test_identities_are_those_that_pixi_wrote(self) -> None:
        """The committed lock is pixi's own: a test with the real one holds that."""
        place = workspace()
        for environment in locks.read(place.source_lock):
            for source in environment.sources:
                row = variants.load(place.variants).get(environment.name, "conda")
                python = source.variants["python"].split(".*")[0]
                rendered = recipe.render(source.name, row.key(python, ArchList.parse(row.default_archs)), place)
                assert source.identity == identity(
                    source.location,
                    variants=source.variants,
                    build_packages=[r.url for r in source.build],
                    host_packages=[r.url for r in source.host],
                    version=rendered.version,
                    build=rendered.build,
                    build_number=rendered.build_number,
                    subdir="linux-64",
                    depends=source.depends,
                )

    def test_it_is_written_as_it_was_read(self, tmp_path: Path) -> None:
        """But for the default environment, which has nothing on no platform."""
        path = workspace().source_lock
        locks.write_locked(locks.read(path), tmp_path / "pixi.lock")
        default = re.compile(r"^  default:\n(?:    .*\n)*", re.MULTILINE)
        assert (tmp_path / "pixi.lock").read_text() == default.sub("", path.read_text())

    def test_agrees_with_its_manifest_and_recipes(self) -> None:
        assert problems(workspace()) == {}

    @pytest.mark.parametrize(
        ("file", "old", "new", "reason"),
        [
            ("mamba-ssm/recipe.yaml", "    - einops", "    - einops\n    - nano", "mamba-ssm: its recipe needs 'nano'"),
            (
                "mamba-ssm/recipe.yaml",
                "    - ninja",
                "    - ninja\n    - make",
                "environment: needs 'make', the lock has",
            ),
            ("pixi.toml", 'use_ninja = ["1"]', 'use_ninja = ["0"]', "built with use_ninja 0, the lock has 1"),
            (
                "pixi.toml",
                '{ path = "mamba-ssm" }',
                '{ path = "x" }',
                "from the recipe in 'x', the lock has it from 'mam",
            ),
            ("pixi.toml", 'mamba-ssm = { path = "mamba-ssm" }', "", "does not ask for that"),
            ("pixi.lock", "gxx_linux-64-14.4", "gxx_linux-64-13.4", "build environment: needs 'gxx_linux-64 14.*'"),
        ],
    )
    def test_what_changed_after_it_was_written_is_named(
        self, copy: Workspace, file: str, old: str, new: str, reason: str
    ) -> None:
        edit(copy.recipes / file, old, new)
        found = problems(copy)
        assert "cu130" in found
        assert any(reason in problem for problem in found["cu130"]), found["cu130"]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text.replace("- conda_source: mamba-ssm", "- conda_source:  mamba-ssm"),
            lambda text: re.sub(r"^- conda_source: .+\n(?:  .*\n)*", "", text, count=1, flags=re.MULTILINE),
            lambda text: text.replace("  variants:\n", "  variants: []\n  x:\n", 1),
            lambda text: text.replace("  build_packages:\n", "  build_packages: {}\n  x:\n", 1),
            lambda text: text.replace("\n  - conda: ", "\n  - conda_source: ", 1),
            lambda text: re.sub(r"\[(\w{8})\] @ mamba-ssm$", r"(\1) @ mamba-ssm", text, flags=re.MULTILINE),
        ],
    )
    def test_one_edited_by_hand_is_refused_in_one_sentence(self, tmp_path: Path, damage: Callable[[str], str]) -> None:
        text = workspace().source_lock.read_text()
        (tmp_path / "pixi.lock").write_text(damage(text))
        assert (tmp_path / "pixi.lock").read_text() != text
        with pytest.raises(UsageError, match="is not a readable lock file"):
            locks.read(tmp_path / "pixi.lock")


class TestDiff:
    def test_says_which_compiler_changed_and_once_for_both_kernels(self, tmp_path: Path) -> None:
        text = workspace().source_lock.read_text()
        path = tmp_path / "pixi.lock"
        path.write_text(re.sub(r"/gxx_linux-64-14\.\d\.\d-", "/gxx_linux-64-14.0.0-", text))
        found = lock_changes.compare(locks.read(path), locks.read(workspace().source_lock), {})
        compiled = [e for e in found if "compiled" in e.environment]
        assert [e.environment for e in compiled] == [
            f"{name}: what causal-conv1d and mamba-ssm is compiled with" for name in ("cu129", "cu130")
        ]
        assert [(c.kind, c.package, c.old) for c in compiled[0].changes] == [("upgraded", "gxx_linux-64", "14.0.0")]

    def test_says_what_of_the_matrix_and_of_the_needs_changed(self, tmp_path: Path) -> None:
        text = workspace().source_lock.read_text()
        path = tmp_path / "pixi.lock"
        path.write_text(
            text.replace("cuda_arch_list: 8.0;9.0+PTX", "cuda_arch_list: '8.0'").replace("  - einops\n", "")
        )
        notes = lock_changes.compare(locks.read(path), locks.read(workspace().source_lock), {})[0].notes
        assert "causal-conv1d: cuda_arch_list: 8.0 -> 8.0;9.0+PTX" in notes
        assert "mamba-ssm: needs: nothing -> einops" in notes

    def test_equal_locks_are_equal(self) -> None:
        same = locks.read(workspace().source_lock)
        assert lock_changes.compare(same, same, {}) == []


class TestParts:
    def test_a_lock_without_such_packages_stays_as_it_is(self) -> None:
        text = (ROOT / "pixi.lock").read_text()
        assert lock_sources.part(text) == lock_sources.Parted(text, (), {})

    @pytest.mark.parametrize(
        ("data", "digest"),
        [
            (b"Call me Ishmael. Some", 0xF9B6370105123BE4),
            (bytes(range(100)), 0x4E4F921A64BD1C),
            (bytes(range(200)), 0xF42A8864FEAF0703),
            (bytes(range(256)) * 20, 0xF875F2FA2E99DF80),
        ],
    )
    def test_the_hash_is_the_published_one(self, data: bytes, digest: int) -> None:
        assert xxh3(data) == digest

    def test_the_hash_of_too_little_is_refused(self) -> None:
        with pytest.raises(ValueError, match="16 bytes"):
            xxh3(bytes(16))


class TestRunExports:
    @pytest.fixture
    def channel(self, tmp_path: Path) -> Path:
        folder = tmp_path / "channel"
        make_package(folder, "compiler", {"bin/x": ""})
        make_package(folder, "plain", {"share/x": ""})
        index(folder)
        return folder

    def test_they_are_read_where_the_channel_publishes_them(self, channel: Path) -> None:
        (channel / "linux-64/run_exports.json").write_text(
            '{"packages.conda": {"compiler-1.0-h1_0.conda": {"run_exports": {"strong": ["libx >=1"], "weak": ["y"]}}}}'
        )
        records = solve(Request(specs=("compiler", "plain"), channels=(channel.as_uri(),)))
        assert run_exports.of(records, None) == {
            "compiler": RunExports(strong=("libx >=1",), weak=("y",)),
            # Not in that file: the package itself says that it exports nothing.
            "plain": RunExports(),
        }

    def test_an_index_of_the_engine_has_them_in_its_records(self, channel: Path) -> None:
        package = channel / "linux-64/compiler-1.0-h1_0.conda"
        told = {"info/run_exports.json": b'{"strong": ["libx >=2"]}'}
        rewrite_info(package, package.with_suffix(".new"), lambda files: {**files, **told})
        package.with_suffix(".new").replace(package)
        index(channel)
        records = solve(Request(specs=("compiler",), channels=(channel.as_uri(),)))
        assert run_exports.of(records, None) == {"compiler": RunExports(strong=("libx >=2",))}

    def test_of_a_channel_that_does_not_publish_them_the_packages_are_asked(self, channel: Path) -> None:
        with served(channel) as address:
            records = solve(Request(specs=("plain",), channels=(address,)))
            assert run_exports.of(records, None) == {"plain": RunExports()}

    def test_a_record_that_lacks_them_is_named(self, channel: Path) -> None:
        (record,) = solve(Request(specs=("plain",), channels=(channel.as_uri(),)))
        record.url = "https://example.org/lab/linux-64/plain-1.0-h1_0.conda"
        with pytest.raises(NetworkError, match=r"does not say what plain-1\.0-h1_0\.conda exports"):
            run_exports.of([record], channel)
