"""Of the variants whose main job is not run today, what sets them apart: the toolchain, and what is planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_run import OTHERS, ROWS, fresh_forge, require_sound_toolchain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("variant", [variant for variant in OTHERS if variant == "cu118"])
def test_the_toolchain_fits_together_on_a_machine_without_a_compiler(variant: str, tmp_path: Path) -> None:
    row = ROWS[variant]
    with fresh_forge(row, tmp_path / "logs") as forge:
        require_sound_toolchain(forge("check-toolchain", *row.options, "--json"), row)


@pytest.mark.parametrize("variant", [variant for variant in OTHERS if variant != "cu118"])
def test_everything_is_planned_with_its_versions(variant: str, tmp_path: Path) -> None:
    row = ROWS[variant]
    with fresh_forge(row, tmp_path / "logs") as forge:
        done = forge("install-mamba", *row.options, "--cuda-arch", row.arch, "--dry-run", "--json")
        assert done.returncode == 0, done.stderr
        planned = {package["name"]: (package["version"], package["state"]) for package in done.json["packages"]}
        assert planned == {"causal-conv1d": ("1.7.0", "to build"), "mamba-ssm": (row.mamba_ssm, "to build")}
        assert done.json["python"].startswith(f"{row.python}.")
        assert done.json["cuda_arch"] == row.arch
        assert not forge.packages()
