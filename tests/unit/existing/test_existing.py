"""An environment that is there: what is read of it, and every one that is refused, in time and with nothing written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fake_environment import add, add_needs, add_torch, make_venv, site_of, tree, version_py
from front_door import assert_one_line_error, run_here
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import InstallError, MachineError, UsageError
from ssm_forge.base.paths import workspace
from ssm_forge.existing import job, needs, plan, reader, rows, torch
from ssm_forge.flow.plan import Options
from ssm_forge.manifest import variants


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


def test_a_refusal_comes_through_the_front_door_in_one_line(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env), local="+cpu", cuda=None)
    started = time.monotonic()
    done = run_here("install-mamba", "--prefix", env)
    took = time.monotonic() - started
    assert_one_line_error(done, InstallError.exit_code)
    assert took < 60  # Seconds on a loaded machine; it compiles nothing and asks no network.


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


def test_a_venv_of_uv_gets_uvs_line(tmp_path: Path) -> None:
    env = make_venv(tmp_path, by_uv=True)
    assert needs.command(existing(env), ("einops",)) == f"uv pip install --python {env}/bin/python einops"


def test_a_capability_that_the_toolkit_lacks_says_what_can_be_had(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env))
    add_needs(site_of(env))
    with pytest.raises(UsageError, match=r"nvcc 12.4, which can't target 12.0") as refused:
        rows.check_archs(ArchList.parse("12.0"), row(env))
    assert "9.0+PTX" in refused.value.fix


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
