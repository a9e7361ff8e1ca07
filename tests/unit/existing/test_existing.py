"""An environment that is there: what is read of it, and every one that is refused, in time and with nothing written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from fake_environment import add, add_needs, add_torch, elf, make_venv, site_of, tree, version_py
from front_door import assert_one_line_error, run_here
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import InstallError, MachineError, UsageError
from ssm_forge.base.paths import workspace
from ssm_forge.bridge.toolkit import toolkit_packages
from ssm_forge.existing import in_use, job, needs, plan, reader, rows, torch
from ssm_forge.flow.plan import Options
from ssm_forge.manifest import recipe, variants


def existing(env: Path) -> reader.Existing:
    place = reader.find(env)
    assert place is not None
    return reader.read(place)


def row(env: Path) -> rows.Row:
    there = existing(env)
    return rows.derive(there, torch.read(there), variants.load(workspace().variants), workspace())


def test_a_venv_tells_its_python_its_torch_and_whose_it_is(tmp_path: Path) -> None:
    env = make_venv(tmp_path, by_uv=True)
    add_torch(site_of(env))
    there = existing(env)
    assert (there.kind, there.version, there.by_uv, there.sites) == ("venv", "3.11.7", True, (site_of(env),))
    found = torch.read(there)
    assert (found.version, found.minor, found.cuda, found.cxx11) == ("2.7.1+cu126", "2.7", "12.6", True)


def test_the_cpp_abi_is_that_of_torchs_own_symbols(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env))
    # The wheels of before torch 2.6 also hold GCC's own C++ library.
    (site_of(env) / "torch/lib/libc10.so").write_bytes(
        b"_ZNSt11logic_errorC1ERKNSt7__cxx1112basic_stringIcE\0_ZN3c105ErrorC1ENS_14SourceLocationESs\0"
    )
    assert not torch.read(existing(env)).cxx11


def test_a_project_and_an_interpreter_name_the_environment_that_they_belong_to(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    (tmp_path / "project").mkdir()
    env.rename(tmp_path / "project/.venv")
    assert reader.find(tmp_path / "project") == tmp_path / "project/.venv"
    assert reader.find(tmp_path / "project/.venv/bin/python") == tmp_path / "project/.venv"
    assert reader.find(tmp_path / "nothing") is None


def test_packages_of_the_system_are_seen_where_the_venv_sees_them(tmp_path: Path) -> None:
    env = make_venv(tmp_path, system_site=True)
    add_torch(tmp_path / "base/lib/python3.11/site-packages")
    there = existing(env)
    assert there.site == site_of(env)
    assert torch.read(there).folder == tmp_path / "base/lib/python3.11/site-packages/torch"


def test_the_same_torch_is_the_same_wherever_and_by_whomever_it_was_installed(tmp_path: Path) -> None:
    identities = []
    for name, version in (("a", "2.7.1"), ("b", "2.7.1"), ("c", "2.7.0")):
        env = make_venv(tmp_path / name)
        info = add_torch(site_of(env), version, installer="uv" if name == "b" else "pip")
        if name == "b":
            record = (info / "RECORD").read_text().splitlines()
            (info / "RECORD").write_text("\n".join([*reversed(record), "torch/__pycache__/a.cpython-311.pyc,,"]) + "\n")
        if name == "c":
            (info / "RECORD").write_text((info / "RECORD").read_text().replace("sha256=x", "sha256=z"))
        identities.append(torch.read(existing(env)).identity)
    assert identities[0] == identities[1] != identities[2]


def gone_python(env: Path) -> None:
    (env.parent / "base/bin/python3.11").unlink()


def moved(env: Path) -> None:
    (env / "bin/activate").write_text("VIRTUAL_ENV='/somewhere/else'\n")


def no_torch(env: Path) -> None:
    pass


def cpu_torch(env: Path) -> None:
    add_torch(site_of(env), local="+cpu", cuda=None)


def rocm_torch(env: Path) -> None:
    add_torch(site_of(env), local="+rocm6.3", cuda=None, hip="6.3.42131")


def two_dist_infos(env: Path) -> None:
    add_torch(site_of(env))
    add(site_of(env), "torch", "2.6.0", files={})


def two_releases(env: Path) -> None:
    add_torch(site_of(env))
    (site_of(env) / "torch/version.py").write_text(version_py("2.5.1+cu124", "12.4", None))


def no_metadata(env: Path) -> None:
    (add_torch(site_of(env)) / "METADATA").write_text("")


def no_record(env: Path) -> None:
    (add_torch(site_of(env)) / "RECORD").unlink()


def no_headers(env: Path) -> None:
    add_torch(site_of(env), without="torch/include/torch/extension.h")


def no_library(env: Path) -> None:
    add_torch(site_of(env), without="torch/lib/libtorch_cuda.so")


def old_torch(env: Path) -> None:
    add_torch(site_of(env), "1.13.1", local="+cu117", cuda="11.7")


def future_torch(env: Path) -> None:
    add_torch(site_of(env), "2.99.0", local="+cu130", cuda="13.0")


def other_cuda(env: Path) -> None:
    add_torch(site_of(env), "2.8.0", local="+cu99", cuda="99.0")


def no_transformers(env: Path) -> None:
    add_torch(site_of(env))
    add(site_of(env), "einops", "0.8.1")
    add(site_of(env), "packaging", "25.0")
    add(site_of(env), "triton", "3.3.1")


def unmet_in_turn(env: Path) -> None:
    add_torch(site_of(env))
    add_needs(site_of(env))
    (site_of(env) / "transformers-4.57.6.dist-info/METADATA").write_text(
        "Name: transformers\nVersion: 4.57.6\nRequires-Dist: einops<0.5\n\n"
    )


REFUSALS: list[tuple[Callable[[Path], None], int, str, str]] = [
    (gone_python, 8, r"the Python of \S+ is gone", "make the environment anew"),
    (moved, 8, r"was moved or copied: it was made as /somewhere/else", "Make it anew"),
    (no_torch, 8, "has no torch", "pip install torch"),
    (cpu_torch, 8, r"torch 2.7.1\+cpu \S+ \S+ is one without CUDA", "--force-reinstall torch==2.7.1"),
    (rocm_torch, 8, "for AMD's ROCm 6.3.42131", "--force-reinstall torch==2.7.1"),
    (two_dist_infos, 8, "two torches, torch-2.6.0 and torch-2.7.1", "install one"),
    (two_releases, 8, r"version.py says 2.5.1\+cu124, torch-2.7.1.dist-info says 2.7.1", "Install one again"),
    (no_metadata, 8, "no usable dist-info", "--force-reinstall torch"),
    (no_record, 8, "its RECORD can't be read", "Install that package again"),
    (no_headers, 8, "it has no include/torch/extension.h", "--force-reinstall torch"),
    (no_library, 8, "it has no lib/libtorch_cuda.so", "--force-reinstall torch"),
    (old_torch, 8, "has torch 1.13.1", "The nearest that works is torch 2.0"),
    (future_torch, 8, "has torch 2.99.0", "The nearest that works is torch 2."),
    (other_cuda, 8, "built with CUDA 99.0", "Install a torch of one of these"),
    (no_transformers, 8, "transformers is not there", "-m pip install transformers -- or add --with-deps"),
    (unmet_in_turn, 8, "einops is 0.8.1 (transformers needs <0.5)", "pip install 'einops<0.5'"),
]


@pytest.mark.parametrize(("break_it", "code", "what", "fix"), REFUSALS, ids=[case[0].__name__ for case in REFUSALS])
def test_what_nothing_can_be_made_for_is_refused_at_once_and_left_alone(
    tmp_path: Path, break_it: Callable[[Path], None], code: int, what: str, fix: str
) -> None:
    env = make_venv(tmp_path)
    break_it(env)
    before = tree(tmp_path)
    with pytest.raises(InstallError) as refused:
        there = existing(env)
        work = rows.derive(there, torch.read(there), variants.load(workspace().variants), workspace())
        needs.require(there, needs.look(there, work.requires))
    assert refused.value.exit_code == code
    assert refused.match(what) if "(" not in what or "\\" in what else what in str(refused.value)
    assert fix in refused.value.fix
    assert tree(tmp_path) == before


def other_machine(env: Path) -> None:
    add_torch(site_of(env))
    (env.parent / "base/bin/python3.11").write_bytes(elf(183))


def no_site(env: Path) -> None:
    site_of(env).rmdir()


FRONT_DOOR = [*REFUSALS, (other_machine, 3, "a program for aarch64", ""), (no_site, 8, "has no lib/python3.11", "")]


@pytest.mark.parametrize(("break_it", "code", "what", "fix"), FRONT_DOOR, ids=[case[0].__name__ for case in FRONT_DOOR])
def test_a_refusal_comes_through_the_front_door_in_one_line(
    tmp_path: Path, break_it: Callable[[Path], None], code: int, what: str, fix: str
) -> None:
    env = make_venv(tmp_path)
    break_it(env)
    before = tree(tmp_path)
    done = run_here("install-mamba", "--prefix", str(env))
    assert_one_line_error(done, code, fix)
    assert re.search(what, done.stderr) if "(" not in what or "\\" in what else what in done.stderr
    assert tree(tmp_path) == before


def test_a_python_whose_headers_are_nowhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No other Python 3.9 is here, and Debian's packages have none.
    env = make_venv(tmp_path, minor="3.9")
    site = site_of(env, "3.9")
    add_torch(site, "2.0.1", local="", cuda="11.7")
    add_needs(site, triton="2.0.0", transformers="4.51.3")
    (tmp_path / "nowhere").mkdir()
    for name in ("PATH", "HOME", "PYENV_ROOT", "UV_PYTHON_INSTALL_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    before = tree(tmp_path)
    done = run_here("install-mamba", "--prefix", str(env), "--cuda-arch", "8.0")
    assert_one_line_error(done, MachineError.exit_code, "no Python 3.9 with headers", "uv python install 3.9")
    assert tree(tmp_path) == before


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[[Path], int]]:
    """Starts programs that have a file mapped, as a library is, and returns their numbers."""
    started = []

    def start(file: Path) -> int:
        code = "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)"
        command = [sys.executable, "-c", f"{code}; print('there', flush=True); sys.stdin.read()", str(file)]
        begun = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(begun)
        assert begun.stdout is not None
        assert begun.stdout.readline() == b"there\n"
        return begun.pid

    yield start
    for begun in started:
        begun.communicate(b"")


def test_an_environment_in_use_is_refused_naming_the_process(tmp_path: Path, process: Callable[[Path], int]) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env))
    library = site_of(env) / "torch/lib/libtorch_cpu.so"
    library.write_bytes(elf())
    there = existing(env)
    in_use.require_idle(there, torch.read(there))
    number = process(library)
    with pytest.raises(
        InstallError, match=rf"{env} is in use: its libraries are loaded by \S+ \(process {number}\)"
    ) as refused:
        in_use.require_idle(there, torch.read(there))
    assert "--target DIR" in refused.value.fix


def test_beside_an_environment_in_use_only_what_would_be_replaced_counts(
    tmp_path: Path, process: Callable[[Path], int]
) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env))
    library = site_of(env) / "torch/lib/libtorch_cpu.so"
    library.write_bytes(elf())
    beside = tmp_path / "beside"
    beside.mkdir()
    there = reader.read(env, target=beside)
    process(library)
    in_use.require_idle(there, torch.read(there))
    kernels = beside / "selective_scan_cuda.cpython-311-x86_64-linux-gnu.so"
    kernels.write_bytes(elf())
    process(kernels)
    with pytest.raises(InstallError, match=f"{beside} is in use"):
        in_use.require_idle(there, torch.read(there))


def test_a_program_of_another_machine_is_refused(tmp_path: Path) -> None:
    env = make_venv(tmp_path, machine=183)
    with pytest.raises(MachineError, match="a program for aarch64"):
        existing(env)


def test_a_free_threaded_python_is_refused(tmp_path: Path) -> None:
    env = make_venv(tmp_path, minor="3.13")
    (env / "lib/python3.13").rename(env / "lib/python3.13t")
    with pytest.raises(MachineError, match="free-threaded"):
        existing(env)


def test_an_installation_that_its_own_tools_manage_is_refused(tmp_path: Path) -> None:
    make_venv(tmp_path)
    (tmp_path / "base/lib/python3.11/EXTERNALLY-MANAGED").touch()
    with pytest.raises(InstallError, match="EXTERNALLY-MANAGED"):
        existing(tmp_path / "base")


def test_an_environment_that_can_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_venv(tmp_path)
    # Root may write into every folder, so that rights alone would not show it.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != site_of(env) or mode != os.W_OK)
    with pytest.raises(InstallError, match="can't be written"):
        reader.check_writable(existing(env))


def test_another_folder_is_for_an_environment_that_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env))
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(env) or mode != os.W_OK)
    there = reader.read(env, target=tmp_path / "new/folder")
    reader.check_writable(there)
    assert (there.site, there.sites) == (tmp_path / "new/folder", (site_of(env),))
    assert torch.read(there).folder == site_of(env) / "torch"
    assert needs.command(there, ("einops",)).endswith(f"-m pip install --target {tmp_path}/new/folder einops")
    assert not (tmp_path / "new").exists()
    with pytest.raises(InstallError, match="can't be written"):
        reader.check_writable(reader.read(env, target=env / "beside"))
    (tmp_path / "file").touch()
    with pytest.raises(InstallError, match="is no folder"):
        reader.check_writable(reader.read(env, target=tmp_path / "file/beside"))


def test_a_torch_that_is_missing_is_to_be_put_where_the_kernels_go(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match="has no torch") as refused:
        torch.read(reader.read(make_venv(tmp_path), target=tmp_path / "beside"))
    assert f"pip install --target {tmp_path}/beside torch" in refused.value.fix


def test_what_is_in_the_other_folder_counts_as_there(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env))
    add_needs(site_of(env), transformers="4.1.0")
    add(tmp_path / "beside", "transformers", "4.57.6")
    there = reader.read(env, target=tmp_path / "beside")
    assert there.distributions["transformers"].version == "4.57.6"
    assert needs.look(there, {"transformers": ">=4.50"}).wanted == ()


def test_debians_own_python_is_for_another_folder_only(tmp_path: Path) -> None:
    """That of a notebook: packages in dist-packages, several Pythons in one folder."""
    prefix = tmp_path / "usr"
    site = prefix / "local/lib/python3.11/dist-packages"
    for folder in (prefix / "bin", prefix / "lib/python3.11", prefix / "lib/python3/dist-packages", site):
        folder.mkdir(parents=True)
    for minor in ("3.11", "3.13"):
        (prefix / f"bin/python{minor}").write_bytes(elf())
    (prefix / "bin/python3").symlink_to("python3.13")
    add_torch(site)
    add(prefix / "lib/python3/dist-packages", "einops", "0.8.1")
    (prefix / "lib/python3.11/EXTERNALLY-MANAGED").touch()
    named = prefix / "bin/python3.11"
    there = plan.applies(named, workspace(), tmp_path / "beside")
    assert there is not None
    assert (there.python, there.version, there.sites[0]) == (named, "3.11", site)
    assert torch.read(there).folder == site / "torch"
    assert "einops" in there.distributions
    with pytest.raises(InstallError, match="EXTERNALLY-MANAGED") as refused:
        plan.applies(named, workspace())
    assert "--target DIR" in refused.value.fix


@pytest.mark.parametrize("option", [("--target", "x"), ("--mamba-ssm", "2.3.1"), ("--causal-conv1d", "1.7.0")])
def test_what_is_for_an_environment_with_a_torch_is_refused_without_one(
    tmp_path: Path, option: tuple[str, str]
) -> None:
    done = run_here("install-mamba", "--prefix", str(tmp_path / "new"), *option)
    assert_one_line_error(done, UsageError.exit_code, f"{option[0]} is for an environment with a torch")


def conda_environment(root: Path, *records: str) -> Path:
    env = root / "conda"
    (env / "conda-meta").mkdir(parents=True)
    for record in ("python-3.11.9-hb806964_0_cpython", *records):
        (env / f"conda-meta/{record}.json").write_text("{}")
    (env / "bin").mkdir()
    (env / "bin/python3.11").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\x3e\x00")
    (env / "bin/python").symlink_to("python3.11")
    site_of(env).mkdir(parents=True)
    return env


def test_pips_torch_in_a_conda_environment_is_for_us(tmp_path: Path) -> None:
    env = conda_environment(tmp_path)
    add_torch(site_of(env))
    there = plan.applies(env, workspace())
    assert there is not None
    assert (there.kind, there.minor) == ("conda", "3.11")


def test_an_interpreter_names_a_conda_environment_too(tmp_path: Path) -> None:
    env = conda_environment(tmp_path, "pytorch-2.7.1-cuda126_generic_py311_h1_200")
    done = run_here("install-mamba", "--prefix", str(env / "bin/python"))
    assert_one_line_error(done, InstallError.exit_code, f"{env} has conda's pytorch 2.7.1")
    assert reader.folder_of(env) == env
    assert reader.folder_of(None) is None


def test_condas_torch_and_a_conda_environment_without_one_get_conda_packages(tmp_path: Path) -> None:
    assert plan.applies(conda_environment(tmp_path / "a"), workspace()) is None
    env = conda_environment(tmp_path / "b", "pytorch-2.7.1-cuda126_generic_py311_h1_200")
    add_torch(site_of(env), local="", installer="conda")
    assert plan.applies(env, workspace()) is None


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_pips_torch_over_condas_is_refused_naming_both(tmp_path: Path, installer: str) -> None:
    env = conda_environment(tmp_path, "pytorch-2.5.1-cuda124_py311_h2_306")
    add_torch(site_of(env), installer=installer)
    with pytest.raises(InstallError, match=rf"conda's pytorch 2.5.1 \(cuda124.*torch 2.7.1 that {installer} installed"):
        plan.applies(env, workspace())


@pytest.mark.parametrize(
    ("version", "cuda", "triton", "toolkit", "mamba"),
    [
        ("2.0.1", "11.7", "2.0.0", "cu118", "2.3.1"),
        ("2.4.1", "12.1", "3.0.0", "cu124", "2.3.1"),
        ("2.7.1", "12.6", "3.3.1", "cu124", "2.3.1"),
        ("2.8.0", "12.8", "3.4.0", "cu124", "2.3.1"),
        ("2.9.1", "12.8", "3.5.1", "cu124", "2.3.2.post1"),
        ("2.11.0", "13.0", "3.6.0", "cu130", "2.3.2.post1"),
        ("2.15.0", "13.2", "3.9.0", "cu130", "2.3.2.post1"),
    ],
)
def test_the_row_follows_the_torch(
    tmp_path: Path, version: str, cuda: str, triton: str, toolkit: str, mamba: str
) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env), version, local="", cuda=cuda)
    add_needs(site_of(env), triton=triton)
    found = row(env)
    assert (found.toolkit, found.variant.row["mamba_ssm"]) == (toolkit, mamba)
    assert found.variant.torch == ".".join(version.split(".")[:2])
    assert found.variant.row["pytorch_build"].startswith(f"there_cuda{cuda.replace('.', '')}_")
    assert "." not in found.variant.row["pytorch_build"]


@pytest.mark.parametrize(
    ("python", "version", "cuda", "old"),
    [
        ("3.9", "2.8.0", "12.8", True),
        ("3.10", "2.1.2", "12.1", True),
        ("3.11", "2.2.2", "12.1", False),
        ("3.14", "2.15.0", "13.0", False),
    ],
)
def test_the_tools_of_a_build_run_with_that_python_and_that_torch(
    tmp_path: Path, python: str, version: str, cuda: str, old: bool
) -> None:
    env = make_venv(tmp_path, minor=python)
    add_torch(site_of(env, python), version, local="", cuda=cuda)
    there = existing(env)
    found = torch.read(there)
    matrix = variants.load(workspace().variants)
    toolkit = rows.derive(there, found, matrix, workspace()).toolkit
    tools = {wheel.name: Version(wheel.version) for wheel in plan._tools(python, found, toolkit, matrix, workspace())}
    assert set(tools) == needs.TOOLS
    # torch before 2.2 imports packaging from pkg_resources; pip 26.1 needs Python 3.10.
    assert (tools["setuptools"] < Version("70"), tools["pip"] < Version("26.1")) == (old, old)


def with_releases(env: Path, **releases: str) -> rows.Row:
    there = existing(env)
    named = {name.replace("_", "-"): release for name, release in releases.items()}
    return rows.derive(there, torch.read(there), variants.load(workspace().variants), workspace(), named)


def test_a_release_can_be_named(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env), "2.11.0", local="", cuda="13.0")
    add_needs(site_of(env), triton="3.6.0")
    assert with_releases(env).variant.projects == {"causal-conv1d": "1.7.0", "mamba-ssm": "2.3.2.post1"}
    found = with_releases(env, mamba_ssm="2.3.1", causal_conv1d="1.7.0").variant
    assert found.projects == {"causal-conv1d": "1.7.0", "mamba-ssm": "2.3.1"}


def test_a_release_that_no_recipe_builds_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env))
    add_needs(site_of(env))
    with pytest.raises(
        UsageError, match=r"no recipe here builds mamba-ssm 2\.2\.4; they build 2\.3\.2\.post1, 2\.3\.1"
    ) as refused:
        with_releases(env, mamba_ssm="2.2.4")
    assert "--source-tree" in refused.value.fix


def test_an_older_release_is_built_and_says_what_it_lacks_and_needs(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env), "2.0.1", local="", cuda="11.7")
    add_needs(site_of(env), triton="2.0.0")
    assert with_releases(env).lacks == ()
    found = with_releases(env, mamba_ssm="2.2.5", causal_conv1d="1.5.2")
    assert found.variant.projects == {"causal-conv1d": "1.5.2", "mamba-ssm": "2.2.5"}
    assert [text[:39] for text in found.lacks] == [
        "mamba-ssm 2.2.5 lacks 64-bit offsets in",
        "causal-conv1d 1.5.2 lacks 64-bit offset",
    ]
    # Of the torch, and of the release.
    assert set(found.requires["transformers"].split(",")) == {"<4.52", "<5"}
    assert "mamba-ssm 2.2.5 was asked for" in found.why


def test_a_release_that_the_cuda_of_the_torch_can_not_compile_is_refused(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env), "2.11.0", local="", cuda="13.0")
    add_needs(site_of(env), triton="3.6.0")
    with pytest.raises(InstallError, match=r"mamba-ssm 2\.2\.5 needs CUDA <13, and \S+ has 13\.0") as refused:
        with_releases(env, mamba_ssm="2.2.5")
    assert "2.3.2.post1 is the newest" in refused.value.fix


def test_a_release_that_does_not_import_there_is_refused(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env))
    add_needs(site_of(env))
    with pytest.raises(InstallError, match=r"2\.3\.2\.post1 needs Triton >=3\.5, and \S+ has 3\.3\.1") as refused:
        with_releases(env, mamba_ssm="2.3.2.post1")
    assert "2.3.1 is the newest that works with it" in refused.value.fix


def test_the_releases_that_can_be_named_are_those_that_the_recipes_have_sources_of() -> None:
    table = yaml.safe_load((workspace().recipes / "torches.yaml").read_text())
    for project, known in table["releases"].items():
        name = project.replace("_", "-")
        assert list(known) == recipe.releases(name, workspace())
        assert {str(cell[project]) for cell in table["cells"]} <= set(known)
        newest = _patches(name, next(iter(known)))
        for release, facts in known.items():
            lacking = {patch for patch in newest - _patches(name, release) if not _is_of_another_release(patch)}
            assert bool(lacking) == ("lacks" in (facts or {})), (release, lacking)


def _patches(project: str, release: str) -> set[str]:
    """What the patches of a release do, by their names without the number."""
    text = (recipe.recipe_dir(project, workspace()) / "recipe.yaml").read_text(encoding="utf-8")
    entry = text.partition(f'version == "{release}"')[2].partition("\n  - if:")[0].partition("\nbuild:")[0]
    found = re.findall(r"- (\S+\.patch)", entry)
    assert all((recipe.recipe_dir(project, workspace()) / path).is_file() for path in found)
    return {Path(path).name[5:] for path in found}


def _is_of_another_release(patch: str) -> bool:
    """Whether a patch mends what older releases do not have."""
    return patch == "mamba3-one-stage-on-blackwell.patch"


def test_a_triton_that_imports_setuptools_without_saying_so_has_it_named(tmp_path: Path) -> None:
    for version, triton, wanted in (("2.4.1", "3.0.0", ("setuptools",)), ("2.7.1", "3.3.1", ())):
        env = make_venv(tmp_path / version, by_uv=True)
        add_torch(site_of(env), version, local="", cuda="12.1")
        add_needs(site_of(env), triton=triton, setuptools=None)
        assert needs.look(existing(env), row(env).requires).wanted == wanted


def test_a_torch_that_takes_only_cpp20_needs_a_compiler_that_knows_it(tmp_path: Path) -> None:
    ranges = []
    for version in ("2.13.0", "2.14.1"):
        env = make_venv(tmp_path / version)
        add_torch(site_of(env), version, local="", cuda="13.0")
        add_needs(site_of(env), triton="3.8.0")
        ranges.append(row(env).variant.row["host_compiler_range"])
    assert ranges == ["9-15", "10-15"]


def test_transformers_and_numpy_that_turn_themselves_off_are_named(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env), "2.2.2", local="", cuda="12.1")
    add_needs(site_of(env), triton="2.2.0", transformers="5.1.0")
    add(site_of(env), "numpy", "2.1.0")
    there = existing(env)
    found = needs.look(there, row(env).requires)
    assert found.wanted == ("transformers<5", "numpy<2")
    assert needs.command(there, found.wanted).endswith("-m pip install 'transformers<5' 'numpy<2'")


@pytest.mark.parametrize(
    ("version", "triton", "wanted"),
    [("2.0.1", "2.0.0", "<4.52"), ("2.1.2", "2.1.0", "<4.56"), ("2.2.2", "2.2.0", "<5")],
)
def test_an_old_torch_needs_the_transformers_of_its_time(
    tmp_path: Path, version: str, triton: str, wanted: str
) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env), version, local="", cuda="11.8")
    add_needs(site_of(env), triton=triton)
    assert row(env).requires["transformers"] == wanted


def test_a_venv_of_uv_gets_uvs_line(tmp_path: Path) -> None:
    env = make_venv(tmp_path, by_uv=True)
    assert needs.command(existing(env), ("einops",)) == f"uv pip install --python {env}/bin/python einops"


def test_a_capability_that_the_toolkit_lacks_says_what_can_be_had(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env))
    add_needs(site_of(env))
    with pytest.raises(UsageError, match=r"nvcc 12.4, which can't target 11.0") as refused:
        rows.check_archs(ArchList.parse("11.0"), row(env))
    assert "9.0+PTX" in refused.value.fix


def test_blackwell_gets_machine_code_beside_a_torch_of_cuda_12_but_no_ptx_of_its_own(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env), "2.8.0", local="", cuda="12.8")
    add_needs(site_of(env), triton="3.4.0")
    found = row(env)
    rows.check_archs(ArchList.parse("9.0+PTX;10.0;12.0"), found)
    assert {str(c) for c in found.newer} == {"10.0", "12.0"}
    assert not set(found.newer) & set(found.of_nvcc)
    with pytest.raises(UsageError, match=r"nvcc 12.4 makes PTX for at most 9.0, and machine code for 12.0") as refused:
        rows.check_archs(ArchList.parse("12.0+PTX"), found)
    assert "'9.0+PTX;12.0'" in refused.value.fix


@pytest.mark.parametrize(("archs", "ptxas"), [("9.0", None), ("9.0+PTX", None), ("9.0;12.0", "12.9.86")])
def test_a_newer_ptxas_is_brought_only_for_what_needs_it(tmp_path: Path, archs: str, ptxas: str | None) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env), "2.8.0", local="", cuda="12.8")
    add_needs(site_of(env), triton="3.4.0")
    work = plan.make(existing(env), Options(prefix=env, cuda_arch=archs), plan.Wishes({}), workspace())
    parts = work.plan.parts
    assert parts is not None
    found = parts.toolkit.ptxas
    assert (found and found.version) == ptxas
    assert any("12.9.86" in artifact.name for artifact in parts.artifacts) == (ptxas is not None)
    names = {package.name for package in toolkit_packages(parts.toolkit, workspace())}
    assert ("newer-ptxas" in names) == (ptxas is not None)


def options_for(env: Path) -> Options:
    return rows.of_condas(env, reader.conda_records(env), Options(prefix=env), variants.load(workspace().variants))


@pytest.mark.parametrize(
    ("torch_record", "python", "variant", "source"),
    [
        ("pytorch-2.12.0-cuda129_generic_py312_h1_200", "3.12.8", "cu129", "conda"),
        ("pytorch-2.12.1-cuda130_mkl_py312_h1_300", "3.12.8", "cu130", "conda"),
        ("pytorch-2.11.0-bridge_cuda130_py312_h1_0", "3.12.8", "cu130", "bridge"),
        ("pytorch-2.3.0-py3.10_cuda11.8_cudnn8.7.0_0", "3.10.14", "cu118", "conda"),
    ],
)
def test_condas_torch_chooses_the_row_that_is_for_it(
    tmp_path: Path, torch_record: str, python: str, variant: str, source: str
) -> None:
    env = conda_environment(tmp_path, torch_record)
    (env / "conda-meta/python-3.11.9-hb806964_0_cpython.json").rename(
        env / f"conda-meta/python-{python}-hb806964_0_cpython.json"
    )
    chosen = options_for(env)
    assert (chosen.variant, chosen.source, chosen.python) == (variant, source, python.rpartition(".")[0])


def test_condas_torch_that_no_row_is_for_is_refused_naming_it_and_those_that_there_are(tmp_path: Path) -> None:
    env = conda_environment(tmp_path, "pytorch-2.7.1-cuda126_generic_py311_h1_200")
    with pytest.raises(InstallError, match=r"conda's pytorch 2.7.1 \(cuda126\S+\) with Python 3.11.*2.12 with cuda130"):
        options_for(env)


def test_a_conda_environment_without_torch_takes_the_variant_that_is_asked_for(tmp_path: Path) -> None:
    env = conda_environment(tmp_path)
    assert options_for(env) == Options(prefix=env)


def test_a_variant_is_refused_where_the_torch_decides(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    with pytest.raises(UsageError, match="'cu130' says otherwise"):
        job.require_no_variant(existing(env), "cu130")
