"""What most users do: a fresh clone, pixi, no driver, packages from conda's channels (here from their stand-ins)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_run import ROWS, Forge, Outcome, all_pass_but_the_gpu, fresh_forge
from real_pixi import needs_pixi
from ssm_forge import install, lock, pixi

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(3600), needs_pixi]

ROW = ROWS["cu130-conda"]


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """A machine with pixi and the stand-ins, on which nothing was built yet."""
    with fresh_forge(ROW, tmp_path_factory.mktemp("logs"), pixi=True) as made:
        yield made


@pytest.fixture(scope="module")
def first(forge: Forge) -> Outcome:
    """The one command of the README."""
    done = forge.command("pixi", "run", "install-mamba", "--cuda-arch", ROW.arch, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_one_command_ends_in_verified_kernels_in_pixis_own_environment(first: Outcome, forge: Forge) -> None:
    assert first.json["source"] == "conda"
    all_pass_but_the_gpu(first.json["verify"])
    prefix = forge.workspace.envs / ROW.variant
    assert first.json["prefix"] == str(prefix)
    assert pixi.made(prefix)
    assert install.holds(prefix, lock.environment(forge.workspace.lock, ROW.variant).records)


def test_its_lock_is_ours(first: Outcome, forge: Forge) -> None:
    text = forge.workspace.lock.read_bytes()
    assert b"name: p1" in text
    done = forge("lock")
    assert done.returncode == 0, done.stderr
    assert forge.workspace.lock.read_bytes() == text
    assert forge("lock", "--check").returncode == 0


def test_a_script_with_a_quote_in_its_name_runs_where_the_user_stands(
    first: Outcome, forge: Forge, tmp_path: Path
) -> None:
    (tmp_path / "it's.py").write_text("import torch, selective_scan_cuda, mamba_ssm; print(mamba_ssm.Mamba)\n")
    done = forge.command(str(forge.root / "run"), "python", "it's.py", folder=tmp_path)
    assert done.stdout.strip() == "<class 'mamba_ssm.modules.mamba_simple.Mamba'>", done.stderr


def test_again_there_is_nothing_to_do(first: Outcome, forge: Forge) -> None:
    done = forge.command("pixi", "run", "install-mamba", "--cuda-arch", ROW.arch)
    assert done.returncode == 0, done.stderr
    assert "Nothing to do" in done.stderr
