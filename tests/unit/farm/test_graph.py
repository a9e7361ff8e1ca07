"""What waits for what, what is left out where something failed, and what a job is declared to take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ssm_forge.base.errors import MachineError
from ssm_forge.base.paths import workspace
from ssm_forge.channel.index import IndexRecord
from ssm_forge.farm import inputs, receipts
from ssm_forge.farm.cells import every, select
from ssm_forge.farm.engine import Executor
from ssm_forge.farm.jobs import Job, Limits, Wanted, graph
from ssm_forge.farm.receipts import Receipt
from ssm_forge.manifest import recipe, variants

GB = 1_000_000_000
LIMITS = Limits(cores=4, memory=64 * GB)
MATRIX = variants.load(workspace().variants)


def wanted(expression: str, *archs: str) -> list[Wanted]:
    cells = select(every(MATRIX, recipe.PROJECTS, archs or ("9.0",)), expression)
    return [Wanted(cell, f"{cell.name}.conda", f"digest of {cell.name}", done=False) for cell in cells]


def planned(found: list[Wanted], **more: object) -> dict[str, Job]:
    jobs = graph(found, workspace(), LIMITS, **more)  # type: ignore[arg-type]
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for job in jobs:
        assert all(names.index(need) < names.index(job.name) for need in job.needs), "needs come first"
    return {job.name: job for job in jobs}


CONDA = "variant=cu130 source=conda"


def test_toolchain_and_torch_are_made_once_and_one_python_goes_first() -> None:
    jobs = planned(wanted(f"{CONDA} python=3.12,3.13"))
    assert [job.kind for job in jobs.values()].count("toolchain") == 1
    assert [job.kind for job in jobs.values()].count("torch") == 2
    first, other = (jobs[f"mamba-ssm.cu130-conda-py3{minor}-sm90"] for minor in (12, 13))
    assert set(first.needs) == {
        "toolchain.cu130-conda",
        "torch.cu130-conda-py312",
        "causal-conv1d.cu130-conda-py312-sm90",
    }
    assert first.name in other.needs
    assert other.need.cpu < first.need.cpu / 5


def test_without_a_compile_cache_no_python_waits_for_another() -> None:
    jobs = planned(wanted(f"{CONDA} python=3.12,3.13"), shares_objects=False)
    first, other = (jobs[f"causal-conv1d.cu130-conda-py3{minor}-sm90"] for minor in (12, 13))
    assert first.name not in other.needs
    assert other.need.cpu == first.need.cpu


def test_other_capabilities_share_no_objects() -> None:
    jobs = planned(wanted(f"{CONDA} python=3.12", "9.0", "12.0"))
    assert "causal-conv1d.cu130-conda-py312-sm90" not in jobs["causal-conv1d.cu130-conda-py312-sm120"].needs


def test_what_is_there_is_no_job_and_its_objects_are_shared() -> None:
    found = wanted(f"{CONDA} python=3.12,3.13 project=causal-conv1d")
    jobs = planned([replace(found[0], done=True), found[1]])
    assert found[0].cell.name not in jobs
    assert jobs[found[1].cell.name].need.cpu < planned(found)[found[0].cell.name].need.cpu / 5


def test_where_a_python_failed_another_one_goes_first() -> None:
    found = wanted(f"{CONDA}")
    lost = "causal-conv1d.cu130-conda-py312-sm90"
    jobs = planned(found, without=[lost])
    assert lost not in jobs
    # Its test installs what failed.
    assert "mamba-ssm.cu130-conda-py312-sm90" not in jobs
    assert "causal-conv1d.cu130-conda-py313-sm90" in jobs["causal-conv1d.cu130-conda-py314-sm90"].needs
    assert not any(lost in job.needs for job in jobs.values())


def test_a_wheel_waits_for_its_package_where_that_is_not_there() -> None:
    found = wanted(f"{CONDA} python=3.12 project=causal-conv1d")
    (package,) = (one.cell.name for one in found)
    assert planned(found, wheels=True)[f"wheel.{package}"].needs == (package,)
    assert planned([replace(found[0], done=True)], wheels=True)[f"wheel.{package}"].needs == ()


def test_a_package_that_needs_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(MachineError, match=r"needs 2\.9 GB of memory for one compiler, and there are 2\.0 GB"):
        graph(wanted(f"{CONDA} python=3.12 project=causal-conv1d"), workspace(), Limits(4, 2 * GB))


def test_what_a_package_is_made_from_changes_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [one.cell for one in wanted(f"{CONDA} python=3.12", "9.0", "12.0")]

    def digests() -> list[str]:
        return [inputs.digest(inputs.request(cell, "auto", workspace()), workspace()) for cell in cells]

    before = digests()
    assert len(set(before)) == len(before)
    assert digests() == before
    monkeypatch.setattr(recipe, "digest", lambda project, place: f"another {project}")
    assert not set(digests()) & set(before)


def test_the_bridges_locks_are_part_of_what_a_package_is_made_from() -> None:
    (cell,) = (one.cell for one in wanted("variant=cu118 source=bridge python=3.11 project=mamba-ssm"))
    try:
        request = inputs.request(cell, "auto", workspace())
    except MachineError as error:
        pytest.skip(f"no plan can be made on this machine: {error.what}")
    names = {item["uri"] for item in inputs.materials_of(request, workspace()) if item["role"] == "toolchain lock"}
    assert {f"recipes/bridge/pylock.cu118-{part}.toml" for part in ("py311", "toolkit")} <= names


def test_a_receipt_is_believed_as_long_as_the_channel_has_that_very_package(tmp_path: Path) -> None:
    channel = tmp_path
    (channel / "linux-64").mkdir()
    (channel / "linux-64/a.conda").write_bytes(b"abc")
    receipt = Receipt("job", "digest", "built", "a.conda", "hash")
    listed = {"a.conda": IndexRecord("a", "1", "0", sha256="hash", size=3)}
    assert receipts.holds(receipt, channel, listed)
    assert not receipts.holds(receipt, channel, {"a.conda": replace(listed["a.conda"], sha256="another")})
    assert not receipts.holds(receipt, channel, {})
    (channel / "linux-64/a.conda").write_bytes(b"half")
    assert not receipts.holds(receipt, channel, listed)
    (channel / "linux-64/a.conda").unlink()
    assert not receipts.holds(receipt, channel, listed)


def test_a_damaged_receipt_is_none(tmp_path: Path) -> None:
    file = tmp_path / "receipts/package/job.json"
    receipts.write(file, Receipt("job", "digest", "built"))
    assert receipts.read(file) == Receipt("job", "digest", "built")
    file.write_text(file.read_text()[:-5])
    assert receipts.read(file) is None
    assert receipts.read(file.with_name("none.json")) is None


def test_this_machine_gets_its_own_limits_and_others_their_own_options() -> None:
    local = Executor("local", 3, cores=8, memory=16 * GB, retries=2).words
    assert local[local.index("--cores") + 1] == "8"
    assert "mem_mb=16000" in local
    assert "slots=3" in local
    elsewhere = Executor("kubernetes", None, 8, 16 * GB, 1, ("--kubernetes-namespace", "lab")).words
    assert elsewhere[elsewhere.index("--jobs") + 1] == "100"
    assert elsewhere[-2:] == ["--kubernetes-namespace", "lab"]
    assert "--cores" not in elsewhere
