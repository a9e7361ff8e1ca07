"""The build matrix: the file is consistent, and what does not exist is refused with what does."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from front_door import assert_one_line_error, run_here
from ssm_forge.base import platforms
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import UsageError
from ssm_forge.base.paths import workspace
from ssm_forge.base.platforms import LINUX_64, LINUX_AARCH64
from ssm_forge.manifest import recipe
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.variants import DEFAULT_VARIANT, Matrix, Variant, load

MATRIX: Matrix = load(workspace().variants)
ROWS = [pytest.param(row, id=f"{row.name}-{row.source}") for row in MATRIX.variants]


def test_a_variant_has_at_most_one_row_a_source() -> None:
    keys = [(row.name, row.source) for row in MATRIX.variants]
    assert len(keys) == len(set(keys))
    assert DEFAULT_VARIANT in MATRIX.names


@pytest.mark.parametrize("row", ROWS)
def test_architectures_are_what_the_nvcc_has(row: Variant) -> None:
    row.check_archs(ArchList.parse(row.default_archs), MATRIX)
    # 10.3 gets the code for 10.0.
    assert all(any(arch.runs_sass_of(own) for own in row.supported_archs) for arch in row.upstream_archs)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_names_pythons_compilers_and_versions(row: Variant) -> None:
    assert row.pythons
    low, high = (int(bound) for bound in row.row["host_compiler_range"].split("-"))
    assert low <= int(row.row["cxx_compiler_version"]) <= high
    assert row.name == "cu" + row.cuda.replace(".", "") or row.name == "cu130"
    assert set(row.projects) == {"causal-conv1d", "mamba-ssm"}
    for python in row.pythons:
        row.check_python(python)
        values = row.key(python, ArchList.parse(row.default_archs), compiler="99").to_renderer()
        assert all(len(value) == 1 and isinstance(value[0], str) for value in values.values())
        assert values["cxx_compiler_version"] == ["99"]
        assert values["python"][0].startswith(f"{python}.*")


def test_a_build_says_its_platform_where_it_is_not_the_one_that_there_was_first() -> None:
    row, archs = MATRIX.get("cu130", "bridge"), ArchList.parse("9.0")
    first, other = row.key("3.11", archs), row.key("3.11", archs, platform=LINUX_AARCH64)
    assert (first.platform, other.platform) == (LINUX_64, LINUX_AARCH64)
    assert first.settings == {name: value for name, value in other.settings.items() if name != "target_platform"}
    assert other.settings["target_platform"] == "linux-aarch64"
    assert "forge_platforms" not in other.settings
    assert BuildKey.from_provenance({"variant": other.to_provenance()}) == other != first
    with pytest.raises(ValueError, match="target_platform is 'win-64'"):
        BuildKey.from_settings({**other.settings, "target_platform": "win-64"})


def test_a_platform_that_a_row_is_not_made_for_is_refused_with_those_that_it_is() -> None:
    MATRIX.get("cu130", "bridge").check_platform(LINUX_AARCH64)
    assert MATRIX.sources("cu130", LINUX_AARCH64) == ("bridge",)
    for name, source in (("cu118", "bridge"), ("cu130", "conda")):
        row = MATRIX.get(name, source)  # type: ignore[arg-type]
        row.check_platform(LINUX_64)
        with pytest.raises(UsageError, match=rf"{name} \({source}\) is made for linux-64, not for linux-aarch64"):
            row.check_platform(LINUX_AARCH64)


def test_recipes_render_for_both_platforms_to_packages_of_other_names() -> None:
    row, archs = MATRIX.get("cu130", "bridge"), ArchList.parse("9.0")
    for project in recipe.PROJECTS:
        made = {
            platform: recipe.render(project, row.key("3.11", archs, platform=platform), workspace())
            for platform in (LINUX_64, LINUX_AARCH64)
        }
        assert len({rendered.filename for rendered in made.values()}) == 2
        assert {rendered.subdir for rendered in made.values()} == {"linux-64", "linux-aarch64"}
        wanted = {platform: recipe.requirements(rendered) for platform, rendered in made.items()}
        tools = {spec.split()[0] for spec in wanted[LINUX_AARCH64]["build"]}
        assert {"gcc_linux-aarch64", "gxx_linux-aarch64", "cuda-nvcc_linux-aarch64", "sysroot_linux-aarch64"} <= tools
        if platforms.here() == LINUX_64:
            assert {"gxx_impl_linux-64", "python", "pip", "setuptools"} <= tools
            assert not {"python", "pip"} & {spec.split()[0] for spec in wanted[LINUX_64]["build"]}
            assert wanted[LINUX_64]["host"] == wanted[LINUX_AARCH64]["host"]
            assert wanted[LINUX_64]["run"] == wanted[LINUX_AARCH64]["run"]


def test_an_unknown_variant_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"no variant 'cu999'; there are .*cu130"):
        MATRIX.get("cu999", "bridge")
    assert MATRIX.sources("cu999") == ()


def test_a_source_that_a_variant_lacks_is_refused_with_the_one_it_has() -> None:
    single = [row for row in MATRIX.variants if len(MATRIX.sources(row.name)) == 1]
    if not single:
        pytest.skip("every variant comes from both sources")
    other = "bridge" if single[0].source == "conda" else "conda"
    with pytest.raises(UsageError, match=f"can't be made from source {other}.*--source {single[0].source}"):
        MATRIX.get(single[0].name, other)  # type: ignore[arg-type]


def test_an_unknown_python_is_refused_with_those_that_exist() -> None:
    row = MATRIX.get(DEFAULT_VARIANT, "bridge")
    with pytest.raises(UsageError, match=r"exists for Python 3\.10, .*3\.13, not 2\.7"):
        row.check_python("2.7")


def two_rows(tmp_path: Path) -> Matrix:
    file = tmp_path / "variants.yaml"
    file.write_text(
        "zip_keys: [[forge_variant, forge_source, cuda_compiler_version, cuda_arch_supported]]\n"
        "forge_variant: [cu124, cu130]\nforge_source: [conda, conda]\ncuda_compiler_version: ['12.4', '13.0']\n"
        "cuda_arch_supported: ['7.0;8.0', '8.0;10.0']\npython: ['3.12.* *_cpython']\n"
    )
    return load(file)


def test_an_architecture_names_the_variant_that_has_it(tmp_path: Path) -> None:
    matrix = two_rows(tmp_path)
    with pytest.raises(
        UsageError, match=r"nvcc 12\.4 can't target 10\.0; it can target 7\.0, 8\.0\. Use --variant cu130"
    ):
        matrix.get("cu124", "conda").check_archs(ArchList.parse("8.0;10.0"), matrix)
    with pytest.raises(UsageError, match=r"can't target 7\.0, 12\.0.*No variant has it"):
        matrix.get("cu130", "conda").check_archs(ArchList.parse("7.0;12.0"), matrix)


def test_columns_of_unequal_length_and_unknown_sources_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "uneven.yaml"
    file.write_text("zip_keys: [[a, forge_source]]\na: [1, 2]\nforge_source: [conda]\npython: []\n")
    with pytest.raises(UsageError, match="equally many values"):
        load(file)
    other = tmp_path / "source.yaml"
    other.write_text("zip_keys: [[forge_source]]\nforge_source: [pip]\npython: []\n")
    with pytest.raises(UsageError, match="must be one of conda, bridge, not 'pip'"):
        load(other)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--variant", "cu999"), ("no variant 'cu999'", "cu130")),
        (("--source", "bridge", "--cuda-arch", "3.5"), ("can't target 3.5", "it can target 7.5, 8.0")),
        (("--source", "bridge", "--cuda-arch", "10.3"), ("can't target 10.3", "Use 10.0, whose code runs on 10.3")),
        (("--source", "bridge", "--cuda-arch", "hopper"), ("'hopper'", "native, families, all")),
        (("--source", "bridge", "--python", "2.7"), ("3.12", "not 2.7")),
    ],
)
def test_the_command_line_says_so_in_one_line(args: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    done = run_here("install-mamba", *args, SSM_FORGE_CACHE_DIR=str(tmp_path / "cache"))
    assert_one_line_error(done, 2, *words)
    assert not (tmp_path / "cache").exists()


@pytest.mark.filterwarnings("ignore:build_recipes is deprecated")
@pytest.mark.parametrize("row", ROWS)
def test_rattler_build_alone_makes_what_exists_in_the_conda_channels(row: Variant, tmp_path: Path) -> None:
    """What exists fails at the empty channel, what does not is skipped."""
    from rattler_build import RattlerBuildError, build_recipes

    place = workspace()
    common = yaml.safe_load(place.variants.read_text())["build_source"]
    for python, spec in row.python_specs.items():
        values = row.key(row.pythons[0], ArchList.parse(row.default_archs)).to_renderer()
        (tmp_path / "variants.yaml").write_text(yaml.safe_dump({**values, "python": [spec], "build_source": common}))
        made = False
        try:
            build_recipes(
                [place.recipes / "causal-conv1d/recipe.yaml"],
                variant_config=[str(tmp_path / "variants.yaml")],
                ignore_recipe_variants=True,
                channel=[(tmp_path / "empty").as_uri()],
                output_dir=tmp_path / "out",
            )
        except RattlerBuildError as error:
            assert "Failed to resolve dependencies" in str(error)
            made = True
        assert made == (row.source == "conda" and python in row.pythons), python
