"""Two .conda files side by side: what differs is named, the first difference shown so that a person can read it."""

from __future__ import annotations

import io
import json
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard

from ssm_forge.base.errors import IntegrityError, MachineError
from ssm_forge.package import libraries as elf
from ssm_forge.package.differences import Comparison, Difference, compare
from ssm_forge.package.file_differences import LINES

needs_gcc = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("objcopy")), reason="no gcc and binutils on this machine"
)

PAYLOAD = {"lib/a.py": b"one\ntwo\nthree\n", "lib/data.bin": bytes(range(256)) * 4}
INFO = {"info/index.json": b'{\n  "name": "demo"\n}\n', "info/paths.json": b"{}\n"}


def tar(files: dict[str, bytes | str], *, mtime: int = 1, modes: dict[str, int] | None = None) -> bytes:
    """A tar of these files in this order; a str is a symbolic link's target."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.mtime, member.mode = mtime, (modes or {}).get(name, 0o644)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                opened.addfile(member)
            else:
                member.size = len(content)
                opened.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def conda(
    path: Path,
    payload: bytes | None = None,
    info: bytes | None = None,
    *,
    stem: str = "demo-1-0",
    level: int = 3,
    date: tuple[int, int, int, int, int, int] = (2026, 1, 1, 0, 0, 0),
    metadata: bytes = b'{"conda_pkg_format_version":2}',
) -> Path:
    members = {
        "metadata.json": metadata,
        f"pkg-{stem}.tar.zst": zstandard.ZstdCompressor(level=level).compress(payload or tar({**PAYLOAD})),
        f"info-{stem}.tar.zst": zstandard.ZstdCompressor().compress(info or tar({**INFO})),
    }
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as package:
        for name, data in members.items():
            package.writestr(zipfile.ZipInfo(name, date), data)
    return path


def changed(tmp_path: Path, **files: bytes | str) -> Comparison:
    """The package against one with these files instead; ``__`` stands for ``/``, ``_0`` for a dot."""
    other = {**PAYLOAD, **{name.replace("__", "/").replace("_0", "."): data for name, data in files.items()}}
    return compare(conda(tmp_path / "a/demo.conda"), conda(tmp_path / "b/demo.conda", tar(other)))


def only(comparison: Comparison) -> Difference:
    assert not comparison.same
    assert len(comparison.differences) == 1, comparison.differences
    return comparison.differences[0]


def test_the_same_bytes_differ_in_nothing(tmp_path: Path) -> None:
    found = compare(conda(tmp_path / "a/demo.conda"), conda(tmp_path / "b/demo.conda"))
    assert found.same
    assert found.differences == ()


def test_a_changed_line_is_shown_with_its_neighbours(tmp_path: Path) -> None:
    found = only(changed(tmp_path, lib__a_0py=b"one\n2\nthree\n"))
    assert found.where == "lib/a.py"
    assert "14 bytes" in found.what
    assert "12 bytes" in found.what
    assert found.detail[:2] == ("--- package", "+++ rebuilt")
    assert found.detail[3:7] == (" one", "-two", "+2", " three")


def test_what_repeats_other_files_comes_after_them(tmp_path: Path) -> None:
    old = {"a.dist-info/RECORD": b"1", "a/__pycache__/x.pyc": b"1", "z.txt": b"1"}
    new = dict.fromkeys(old, b"2")
    found = compare(
        conda(tmp_path / "a/d.conda", tar({**old}), tar({"info/about.json": b"1", "info/paths.json": b"1"})),
        conda(tmp_path / "b/d.conda", tar({**new}), tar({"info/about.json": b"2", "info/paths.json": b"2"})),
    )
    names = [difference.where for difference in found.differences]
    assert names == ["z.txt", "info/about.json", "a.dist-info/RECORD", "a/__pycache__/x.pyc", "info/paths.json"]
    assert [bool(difference.detail) for difference in found.differences] == [True, False, False, False, False]


def test_files_that_only_one_has_modes_types_and_links_are_named(tmp_path: Path) -> None:
    old = {"gone": b"", "mode": b"", "link": "here", "type": b"x"}
    new = {"mode": b"", "link": "there", "new": b"", "type": "x"}
    found = compare(
        conda(tmp_path / "a/d.conda", tar({**old})), conda(tmp_path / "b/d.conda", tar({**new}, modes={"mode": 0o755}))
    )
    told = {difference.where: difference.what for difference in found.differences}
    assert told["gone"] == "only in the package"
    assert told["new"] == "only in the rebuilt one"
    assert told["mode"] == "mode 644, rebuilt 755"
    assert told["link"] == "points to 'here', rebuilt to 'there'"
    assert told["type"].startswith("a file, rebuilt a symbolic link; points to '', rebuilt to 'x'")
    assert len(told) == 5


def test_json_on_one_line_is_compared_value_by_value(tmp_path: Path) -> None:
    old, new = (json.dumps({"a": 1, "b": [1, last], "c": 3}).encode() for last in (2, 4))
    found = compare(conda(tmp_path / "a/d.conda", tar({"x": old})), conda(tmp_path / "b/d.conda", tar({"x": new})))
    assert [line for line in only(found).detail[2:] if line[0] in "+-"] == ["-    2", "+    4"]


def test_binary_files_show_the_first_byte_that_differs(tmp_path: Path) -> None:
    data = bytearray(PAYLOAD["lib/data.bin"])
    data[0x143] = 0xEE
    found = only(changed(tmp_path, lib__data_0bin=bytes(data)))
    assert found.detail[0] == "first differing byte: 0x143 of 0x400, rebuilt of 0x400"
    old = next(line for line in found.detail if line.startswith("-00000140"))
    new = next(line for line in found.detail if line.startswith("+00000140"))
    assert old.startswith("-00000140  40 41 42 43")
    assert old.endswith("@ABCDEFGHIJKLMNO")
    assert new.startswith("+00000140  40 41 42 ee")


@pytest.mark.parametrize("size", [0, 1, 0x3FF, 1 << 16, (1 << 16) + 1])
def test_a_longer_file_differs_where_the_shorter_one_ends(tmp_path: Path, size: int) -> None:
    old = b"\xff" * size
    found = compare(
        conda(tmp_path / "a/d.conda", tar({"x": old})), conda(tmp_path / "b/d.conda", tar({"x": old + b"\xfe"}))
    )
    assert only(found).detail[0] == f"first differing byte: {size:#x} of {size:#x}, rebuilt of {size + 1:#x}"


def test_long_differences_are_cut_and_say_so(tmp_path: Path) -> None:
    found = only(changed(tmp_path, lib__a_0py="".join(f"{n}\n" for n in range(500)).encode() + b"x" * 1000))
    assert len(found.detail) == LINES + 1
    assert found.detail[-1].startswith("... and ")
    assert all(len(line) < 250 for line in found.detail)


def test_nothing_in_a_package_reaches_the_terminal_as_an_escape(tmp_path: Path) -> None:
    found = only(changed(tmp_path, lib__a_0py=b"one\n\x1b[2Jtwo\r\nthree\n"))
    assert r"+\x1b[2Jtwo\x0d" in found.detail
    assert "\x1b" not in "".join(found.detail)


def library(folder: Path, code: str, *options: str) -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "lib.so"
    command = ["gcc", "-x", "c", "-", "-o", target, *(options or ("-shared", "-fPIC"))]
    subprocess.run(command, input=code.encode(), check=True, capture_output=True)
    return target.read_bytes()


def compare_libraries(tmp_path: Path, old: bytes, new: bytes) -> Difference:
    return only(
        compare(
            conda(tmp_path / "a/d.conda", tar({"lib.so": old})), conda(tmp_path / "b/d.conda", tar({"lib.so": new}))
        )
    )


@needs_gcc
def test_libraries_say_which_sections_and_symbols_differ(tmp_path: Path) -> None:
    old = library(tmp_path, "int same(void) { return 1; } int before(void) { return 2; }")
    new = library(tmp_path, "int same(void) { return 7; } int after(void) { return 2; }")
    detail = compare_libraries(tmp_path, old, new).detail
    text = next(line for line in detail if line.startswith("  .text: "))
    assert " bytes at 0x" in text
    assert "first differing byte 0x" in text
    assert not [line for line in detail if line.startswith("  .init: ")]
    assert detail[detail.index("symbols added: 1") + 1] == "  after"
    assert detail[detail.index("symbols removed: 1") + 1] == "  before"
    assert any(line.startswith("in .") for line in detail)


@needs_gcc
def test_another_compiler_shows_in_the_comment(tmp_path: Path) -> None:
    old = library(tmp_path, "int f(void) { return 1; }")
    assert b"GCC: (" in old
    new = old.replace(b"GCC: (", b"XCC: (")
    detail = compare_libraries(tmp_path, old, new).detail
    assert [line for line in detail if line.startswith("-GCC: (")]
    assert [line for line in detail if line.startswith("+XCC: (")]


@needs_gcc
def test_a_broken_library_is_compared_as_bytes(tmp_path: Path) -> None:
    detail = compare_libraries(tmp_path, b"\x7fELF" + b"a" * 40, b"\x7fELF" + b"b" * 40).detail
    assert "first differing byte: 0x4 of 0x2c, rebuilt of 0x2c" in detail


# Does for x86 objects in .nv_fatbin what NVIDIA's tool does for cubins.
TOOL = """\
#!{python}
import subprocess, sys
if sys.argv[1] == "--extract-elf":
    subprocess.run(["objcopy", "--dump-section", ".nv_fatbin=code.1.sm_90.cubin", "code.so"], check=True)
elif sys.argv[1] == "--dump-sass":
    function, cubin = sys.argv[3:]
    sections = ["-j", ".text." + function]
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", *sections, cubin], capture_output=True, text=True)
    for line in code.stdout.splitlines()[4:]:
        print(line, " /* 0x0123456789abcdef */")
else:
    sys.exit(1)
"""


@pytest.fixture
def cuobjdump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "cuobjdump"
    tool.write_text(TOOL.format(python=sys.executable))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(elf, "cuobjdump", lambda: tool)


def kernels(tmp_path: Path, code: str) -> bytes:
    """A library whose .nv_fatbin is an object of ``code``."""
    (tmp_path / "object.o").write_bytes(library(tmp_path, code, "-c", "-O1", "-ffunction-sections"))
    library(tmp_path, "int host;")
    add = ["--add-section", f".nv_fatbin={tmp_path / 'object.o'}", tmp_path / "lib.so"]
    subprocess.run(["objcopy", *add], check=True)
    return (tmp_path / "lib.so").read_bytes()


@needs_gcc
@pytest.mark.usefixtures("cuobjdump")
def test_gpu_code_is_shown_as_instructions_of_the_function_that_differs(tmp_path: Path) -> None:
    old = kernels(tmp_path, "int same(int x) { return x; } int scan(int x) { return x + 0x1111; }")
    new = kernels(tmp_path, "int same(int x) { return x; } int scan(int x) { return x + 0x2222; }")
    detail = compare_libraries(tmp_path, old, new).detail
    assert "the GPU code differs (.nv_fatbin)" in detail
    assert "GPU binaries that differ: 1 of 1, the first one: code.1.sm_90.cubin" in detail
    assert "functions in it that differ: 1, the first one: scan" in detail
    removed, added = ([line for line in detail if line[0] == sign and "0x" in line] for sign in "-+")
    assert len(removed) == len(added) == 1
    assert "0x1111" in removed[0]
    assert "0x2222" in added[0]
    assert "0123456789abcdef" not in "".join(detail)


@needs_gcc
def test_without_cuobjdump_the_gpu_code_is_said_to_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise MachineError("cuobjdump is missing from the tools.")

    monkeypatch.setattr(elf, "cuobjdump", missing)
    old, new = (kernels(tmp_path, f"int scan(int x) {{ return x + {n}; }}") for n in (1111, 2222))
    detail = compare_libraries(tmp_path, old, new).detail
    assert detail[-2:] == (
        "the GPU code differs (.nv_fatbin)",
        "not disassembled: cuobjdump is missing from the tools.",
    )


def test_the_same_files_compressed_otherwise_are_the_containers_matter(tmp_path: Path) -> None:
    old, new = conda(tmp_path / "a/d.conda", level=1), conda(tmp_path / "b/d.conda", level=19)
    found = compare(old, new).differences[0]
    assert found.where == "pkg-demo-1-0.tar.zst"
    assert found.what == "the same tar, compressed otherwise"
    assert found.detail[0].startswith("first differing byte: 0x")


def test_times_and_order_in_a_tar_are_named(tmp_path: Path) -> None:
    old = conda(tmp_path / "a/d.conda")
    later = conda(tmp_path / "b/d.conda", tar({**PAYLOAD}, mtime=7))
    assert compare(old, later).differences[0].what == ("the same files in another tar: lib/a.py has time 1, rebuilt 7")
    turned = conda(tmp_path / "c/d.conda", tar(dict(reversed(PAYLOAD.items()))))
    assert only(compare(old, turned)).what == "the same files in another tar: its members are in another order"


def test_the_zips_own_metadata_is_named(tmp_path: Path) -> None:
    old, new = conda(tmp_path / "a/d.conda"), conda(tmp_path / "b/d.conda", date=(2026, 2, 3, 0, 0, 0))
    found = compare(old, new).differences
    assert [difference.where for difference in found] == [
        "metadata.json",
        "pkg-demo-1-0.tar.zst",
        "info-demo-1-0.tar.zst",
    ]
    assert found[0].what == "zip metadata: date_time (2026, 1, 1, 0, 0, 0), rebuilt (2026, 2, 3, 0, 0, 0)"


def test_other_names_and_bytes_in_the_zip_are_named(tmp_path: Path) -> None:
    old = conda(tmp_path / "a/d.conda")
    named = compare(old, conda(tmp_path / "b/d.conda", stem="demo-1-1"))
    assert only(named).where == "zip"
    assert "+pkg-demo-1-1.tar.zst" in only(named).detail
    other = compare(old, conda(tmp_path / "c/d.conda", metadata=b'{"conda_pkg_format_version":3}'))
    assert only(other).where == "metadata.json"
    assert '+  "conda_pkg_format_version": 3' in only(other).detail


def test_bytes_outside_of_the_zips_members_are_found_too(tmp_path: Path) -> None:
    old, new = conda(tmp_path / "a/d.conda"), conda(tmp_path / "b/d.conda")
    new.write_bytes(b"leading" + new.read_bytes())
    found = only(compare(old, new))
    assert found.what == "the same members in another structure"
    assert found.detail[0].startswith("first differing byte: 0x0 of ")


@pytest.mark.parametrize("damage", ["no zip", "cut", "part missing", "no tar", "no zstd"])
def test_a_damaged_package_is_refused(tmp_path: Path, damage: str) -> None:
    good, bad = conda(tmp_path / "a/d.conda"), conda(tmp_path / "b/d.conda", tar({"x": b"y" * 999}))
    if damage == "no zip":
        bad.write_bytes(b"nothing")
    elif damage == "cut":
        bad.write_bytes(bad.read_bytes()[:-200])
    elif damage == "no tar":
        conda(bad, payload=b"x" * 2000)
    else:
        with zipfile.ZipFile(bad, "w") as package:
            package.writestr("pkg-demo-1-0.tar.zst" if damage == "no zstd" else "metadata.json", b"x" * 99)
    with pytest.raises(IntegrityError, match=r"is not a whole \.conda package"):
        compare(good, bad)
