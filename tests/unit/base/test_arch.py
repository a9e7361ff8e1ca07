"""Compute capabilities: reading, writing, families, and which GPU runs what."""

from __future__ import annotations

import pytest
from rattler import VersionSpec
from rattler.version import Version

from ssm_forge.base.arch import ArchList, Capability, families, resolve
from ssm_forge.base.errors import UsageError

CUDA_118 = "3.5;3.7;5.0;5.2;5.3;6.0;6.1;6.2;7.0;7.2;7.5;8.0;8.6;8.7;8.9;9.0"
CUDA_124 = "5.0;5.2;5.3;6.0;6.1;6.2;7.0;7.2;7.5;8.0;8.6;8.7;8.9;9.0"
CUDA_130 = "7.5;8.0;8.6;8.7;8.8;8.9;9.0;10.0;10.3;11.0;12.0;12.1"


def cc(text: str) -> Capability:
    return Capability.parse(text)


def archs(text: str) -> ArchList:
    return ArchList.parse(text)


def resolved(request: str | None, gpus: tuple[str, ...] = ()) -> ArchList:
    return resolve(
        request,
        supported=archs(CUDA_130).sass,
        upstream=archs("7.5;8.0;9.0").sass,
        default="8.0;9.0+PTX",
        gpus=[cc(gpu) for gpu in gpus],
    )


@pytest.mark.parametrize("text", ["8.0;9.0+PTX", "9.0+ptx, 8.0", " 8.0  9.0+PTX ", "8.0;9.0;9.0+PTX", "8.0;9.0+PTX;"])
def test_a_list_is_read_in_every_usual_form(text: str) -> None:
    found = archs(text)
    assert found == ArchList((Capability(8, 0), Capability(9, 0)), (Capability(9, 0),))
    assert str(found) == "8.0;9.0+PTX"


@pytest.mark.parametrize("text", ["", ";", "9", "9.0a", "sm_90", "8.0;nine", "90", "8.0 +PTX", "9.0+PTX+PTX", "-9.0"])
def test_what_is_no_list_is_refused_with_the_forms_that_exist(text: str) -> None:
    with pytest.raises(UsageError, match=r"native, families, all, or a list such as"):
        archs(text)


def test_an_error_names_the_item_and_the_whole_argument() -> None:
    with pytest.raises(UsageError, match=r"'nine' in --cuda-arch '8\.0;nine' is not a compute capability"):
        archs("8.0;nine")


@pytest.mark.parametrize("text", ["9", "9.0+PTX", "x", ""])
def test_a_single_capability_takes_no_suffix(text: str) -> None:
    with pytest.raises(UsageError, match=r"Write it as MAJOR\.MINOR"):
        cc(text)


@pytest.mark.parametrize("text", ["9.0", "8.0;9.0+PTX", "7.5;8.0+PTX;10.0;12.1+PTX"])
def test_the_tag_in_a_build_string_is_read_back(text: str) -> None:
    tag = archs(text).tag
    assert ArchList.from_tag(tag) == archs(text)
    assert ArchList.from_tag(f"cuda130_py312_{tag}_h0a1b2c3_0") == archs(text)


def test_a_build_string_without_architectures_gives_none() -> None:
    assert ArchList.from_tag("cuda130_py312_h0a1b2c3_0").sass == ()


def test_ptx_that_has_no_sass_beside_it_is_visible() -> None:
    assert ArchList((cc("8.0"),), (cc("9.0"),)).tag == "sm80_compute90"
    assert ArchList((cc("8.0"),), (cc("9.0"),)).tag != archs("8.0").tag


@pytest.mark.parametrize("sm", ["103", "sm_103", "sm_103a", "compute_103"])
def test_the_names_in_binaries_are_read(sm: str) -> None:
    assert Capability.from_sm(sm) == Capability(10, 3)
    assert Capability(10, 3).sm == "103"


@pytest.mark.parametrize(
    ("supported", "expected"),
    [
        (CUDA_118, "3.5;5.0;6.0;7.0;8.0;9.0"),
        (CUDA_124, "5.0;6.0;7.0;8.0;9.0"),
        # 11.0 is Tegra alone in its major: it has nobody else's binaries to run.
        (CUDA_130, "7.5;8.0;9.0;10.0;11.0;12.0"),
    ],
)
def test_families_are_one_sass_a_major(supported: str, expected: str) -> None:
    assert str(families(archs(supported).sass)) == expected


@pytest.mark.parametrize("gpu", archs(CUDA_130).sass, ids=str)
def test_every_desktop_gpu_of_a_toolkit_runs_its_families_natively(gpu: Capability) -> None:
    expected = "none" if gpu == cc("8.7") else "native"
    assert families(archs(CUDA_130).sass).support(gpu) == expected


@pytest.mark.parametrize(
    ("built_for", "gpu", "support"),
    [
        ("8.0", "8.0", "native"),
        ("8.0", "8.6", "native"),
        ("8.6", "8.0", "none"),
        ("8.0", "9.0", "none"),
        ("8.0;9.0+PTX", "12.0", "jit"),
        ("8.0;9.0+PTX", "8.9", "native"),
        ("8.0;9.0+PTX", "7.5", "none"),
        ("8.0+PTX", "8.7", "jit"),
        # Tegra parts and the others of their major don't run each other's machine code.
        ("8.0", "8.7", "none"),
        ("8.7", "8.7", "native"),
        ("8.7", "8.9", "none"),
        ("7.0", "7.2", "none"),
        ("10.0", "10.1", "none"),
        ("10.0", "10.3", "native"),
        ("12.0", "12.1", "native"),
    ],
)
def test_which_gpu_runs_what(built_for: str, gpu: str, support: str) -> None:
    assert archs(built_for).support(cc(gpu)) == support


def test_the_default_is_the_gpu_of_the_machine_else_the_portable_list() -> None:
    assert str(resolved(None, ("9.0", "8.0", "9.0"))) == "8.0;9.0"
    assert str(resolved(None)) == "8.0;9.0+PTX"
    # A GPU that the nvcc can't make code for must not make the default fail.
    assert str(resolved(None, ("6.1",))) == "8.0;9.0+PTX"


def test_native_is_the_gpus_of_the_machine() -> None:
    assert str(resolved("native", ("12.0", "8.6"))) == "8.6;12.0"


def test_native_without_a_gpu_says_what_to_write_instead() -> None:
    with pytest.raises(UsageError, match=r"needs an NVIDIA GPU, and none was found.*--cuda-arch 9\.0"):
        resolved("native")


def test_words_and_lists() -> None:
    assert str(resolved("families")) == "7.5;8.0;9.0;10.0;11.0;12.0"
    assert str(resolved("all")) == "7.5;8.0;9.0"
    assert str(resolved("8.9+PTX")) == "8.9+PTX"


SOME = [cc("7.5"), cc("8.0"), cc("8.7"), cc("9.0"), cc("10.0"), cc("12.0")]
EVERY_LIST = [
    ArchList(sass, ptx)
    for sass in (tuple(c for i, c in enumerate(SOME) if bits >> i & 1) for bits in range(64))
    for ptx in ((), *((c,) for c in SOME), (SOME[1], SOME[4]))
    if sass or ptx
]


def test_the_forms_are_inverse_for_every_list() -> None:
    """With SASS, with PTX beside it, and with PTX alone."""
    for made in EVERY_LIST:
        assert ArchList.from_tag(made.tag) == made
        assert ArchList.from_tag(f"cuda130_py312_{made.tag}_h0a1b2c3_0") == made
        assert ArchList.parse(str(made)) == made


def test_the_range_of_gpus_is_those_that_are_supported() -> None:
    tegra = cc("8.7")
    gpus = [*SOME, cc("7.0"), cc("8.6"), cc("8.9"), cc("10.3"), cc("12.1"), cc("13.0")]
    for made in (made for made in EVERY_LIST if tegra not in (*made.sass, *made.ptx)):
        spec = VersionSpec(made.gpu_range)
        for gpu in (gpu for gpu in gpus if gpu != tegra):
            assert spec.matches(Version(str(gpu))) == (made.support(gpu) != "none"), (made, gpu)


def test_ptx_alone_can_be_read_but_not_asked_for() -> None:
    with pytest.raises(UsageError, match="PTX alone"):
        resolve("8.0;compute_90", supported=SOME, upstream=SOME, default="8.0", gpus=[])


@pytest.mark.parametrize("request_", [None, "native"])
def test_a_gpu_whose_code_is_not_made_gets_the_code_that_runs_on_it(request_: str | None) -> None:
    supported = [cc("9.0"), cc("10.0"), cc("12.0")]
    got = resolve(request_, supported=supported, upstream=supported, default="9.0+PTX", gpus=[cc("10.3")])
    assert str(got) == "10.0"
