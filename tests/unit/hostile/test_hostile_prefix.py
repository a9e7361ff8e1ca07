"""An environment that somebody else made: its package records."""

from __future__ import annotations

from pathlib import Path

from hostile import hostile, json_files, judge
from hypothesis import given

from ssm_forge.base.errors import InstallError, IntegrityError
from ssm_forge.install import integrity
from ssm_forge.install import pack as packing
from ssm_forge.install.downloads import require_plain_names
from ssm_forge.package import installed as package_installed

RECORD = {
    "name": "tool",
    "version": "1.0",
    "build": "h1_0",
    "build_number": 0,
    "subdir": "linux-64",
    "fn": "tool-1.0-h1_0.conda",
    "url": "https://conda.example/channel/linux-64/tool-1.0-h1_0.conda",
    "channel": "https://conda.example/channel/",
    "depends": [],
    "constrains": [],
    "sha256": "0" * 64,
    "md5": "0" * 32,
    "files": ["bin/tool", "lib/tool.txt"],
    "paths_data": {
        "paths_version": 1,
        "paths": [
            {"_path": "bin/tool", "path_type": "hardlink", "sha256": "0" * 64, "size_in_bytes": 4},
            {"_path": "lib/tool.txt", "path_type": "softlink", "sha256": "0" * 64, "sha256_in_prefix": "1" * 64},
        ],
    },
    "link": {"source": "/pkgs/tool", "type": 1},
}


def _prefix(folder: Path, data: bytes) -> Path:
    prefix = folder / "env"
    for name in ("conda-meta", "bin", "lib"):
        (prefix / name).mkdir(parents=True, exist_ok=True)
    (prefix / "bin" / "tool").write_text("tool", encoding="utf-8")
    if not (prefix / "lib" / "tool.txt").is_symlink():
        (prefix / "lib" / "tool.txt").symlink_to("../bin/tool")
    (folder / "secret").write_text("secret", encoding="utf-8")
    (prefix / "conda-meta" / "tool-1.0-h1_0.json").write_bytes(data)
    return prefix


@hostile()
@given(json_files(RECORD))
def test_a_record_is_read_or_called_damaged_and_its_files_are_looked_for_inside(tmp_path: Path, data: bytes) -> None:
    prefix = _prefix(tmp_path, data)

    def use(report: integrity.Report) -> None:
        for deviation in report.deviations:
            assert ".." not in Path(deviation.path).parts and not deviation.path.startswith("/")
            str(deviation).encode()

    judge(lambda: integrity.verify(prefix, ()), InstallError, then=use)


@hostile()
@given(json_files(RECORD))
def test_records_have_the_fields_that_are_used(tmp_path: Path, data: bytes) -> None:
    def use(records: dict[str, package_installed.InstalledRecord]) -> None:
        for record in records.values():
            f"{record} {record.filename} {record.url} {record.depends}".encode()
            assert all(".." not in Path(path.path).parts for path in record.paths)

    prefix = _prefix(tmp_path, data)
    judge(lambda: package_installed.records(prefix), InstallError, then=use)


@hostile(0.5)
@given(json_files(RECORD))
def test_an_environment_is_packed_from_records_that_the_engine_reads(tmp_path: Path, data: bytes) -> None:
    """Half as many: the engine reads them."""

    prefix = _prefix(tmp_path, data)

    def both() -> None:
        require_plain_names(packing.of_prefix(prefix).records)

    judge(both, InstallError, IntegrityError)
