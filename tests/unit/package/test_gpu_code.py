"""GPU code compared function by function: from cuobjdump's text, with names that say nothing about their file."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import psutil
import pytest

from ssm_forge.base.errors import IntegrityError, MachineError
from ssm_forge.package import gpu_code
from ssm_forge.package import libraries as elf
from ssm_forge.package.gpu_code import Code, Comparison, compare, normalised, parse

# As cuobjdump prints it, the width of its columns included.
HEAD = """\

Fatbin elf code:
================
arch = sm_90
code version = [1,7]
host = linux
compile_size = 64bit

	code for sm_90
"""
ADD = """\
		Function : _Z3addPf
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000e240000000800 */
        /*0010*/                   S2R R77, SR_TID.X ;                   /* 0x00000000004d7919 */
                                                                         /* 0x000e620000002100 */
        /*0020*/              @!P0 BRA 0x20 ;                            /* 0xfffffffc00fc8947 */
                                                                         /* 0x000fc0000383ffff */
		..........


"""
# As nvcc 13.0 names what is local to a file; the number at the end of a file's own part is older compilers'.
ONE = "_GLOBAL__N__26f8b4ab_6_one_cu_5def0eb3"
OTHER = "_GLOBAL__N__cb5bc96f_20_another_name_fp32_cu_5def0eb3"


def listing(*functions: str, head: str = HEAD) -> list[bytes]:
    return "".join((head, *functions)).encode().splitlines(keepends=True)


def add(name: str = "_Z3addPf", **changes: str) -> str:
    """The function under another name, with ``instruction``, ``first`` or ``second`` half of an encoding changed."""
    text = ADD.replace("_Z3addPf", name)
    parts = {"instruction": "S2R R77", "first": "0x00000000004d7919", "second": "0x000e620000002100"}
    for part, new in changes.items():
        assert parts[part] in text
        text = text.replace(parts[part], new)
    return text


def nested(own: str, rest: str, *, start: str = "_ZN") -> str:
    """A mangled name: each part of it has its length in front."""
    return f"{start}{len(own)}{own}{rest}"


def code(text: str) -> Code:
    ((_, codes),) = parse(listing(text)).items()
    ((found, number),) = codes.items()
    assert number == 1
    return found


def test_functions_are_found_by_architecture_and_name() -> None:
    older = HEAD.replace("sm_90", "sm_80")
    lines = listing(add(), add("_Z3mulPf"), older, add())
    assert list(parse(lines)) == [("sm_90", "_Z3addPf"), ("sm_90", "_Z3mulPf"), ("sm_80", "_Z3addPf")]
    assert {count for codes in parse(lines).values() for count in codes.values()} == {1}
    assert parse([]) == parse(listing()) == {}


def test_instructions_are_counted_though_each_has_two_lines() -> None:
    assert code(add()).count == 3
    assert code("\t\tFunction : empty\n").count == 0


def test_neither_addresses_nor_columns_are_part_of_the_code() -> None:
    moved = add().replace("/*0010*/", "/*1230*/").replace(" ;   ", " ;        ").replace("@!P0 BRA", "@!P0  BRA")
    assert moved != add()
    assert code(moved) == code(add())


def test_a_changed_instruction_and_a_changed_encoding_are_told_apart() -> None:
    other = code(add(instruction="S2R R78"))
    assert other.instructions != code(add()).instructions
    assert other.encodings == code(add()).encodings
    for half in ("first", "second"):
        other = code(add(**{half: "0x0123456789abcdef"}))
        assert other.instructions == code(add()).instructions
        assert other.encodings != code(add()).encodings


def test_the_order_of_instructions_counts() -> None:
    lines = add().splitlines(keepends=True)
    swapped = "".join([*lines[:2], *lines[4:6], *lines[2:4], *lines[6:]])
    assert code(swapped).instructions != code(add()).instructions
    assert code(swapped).count == 3


def test_a_name_that_two_files_have_keeps_both_codes() -> None:
    found = parse(listing(add(nested(ONE, "4sameEv")), add(nested(OTHER, "4sameEv"), instruction="S2R R78")))
    ((key, codes),) = found.items()
    assert key == ("sm_90", "_ZN_GLOBAL__N_4sameEv")
    assert sorted(codes.values()) == [1, 1]


def test_identical_different_and_missing_functions_are_told() -> None:
    ours = parse(listing(add("same"), add("scheduled"), add("different"), add("ours")))
    theirs = parse(
        listing(add("theirs"), add("different", instruction="S2R R78"), add("scheduled", second="0x1f"), add("same"))
    )
    found = compare(ours, theirs)
    assert found == Comparison(
        ours=4,
        theirs=4,
        identical=("sm_90 same", "sm_90 scheduled"),
        same_encodings=1,
        different=("sm_90 different",),
        only_ours=("sm_90 ours",),
        only_theirs=("sm_90 theirs",),
        instructions=(12, 12),
    )
    assert found.as_dict() == {
        "functions": [4, 4],
        "instructions": [12, 12],
        "identical": 2,
        "identical_bit_by_bit": 1,
        "different": ["sm_90 different"],
        "only_ours": ["sm_90 ours"],
        "only_theirs": ["sm_90 theirs"],
    }


def test_the_same_function_for_another_architecture_is_another_one() -> None:
    found = compare(parse(listing(add())), parse(listing(add(), head=HEAD.replace("sm_90", "sm_80"))))
    assert found.only_ours == ("sm_90 _Z3addPf",)
    assert found.only_theirs == ("sm_80 _Z3addPf",)
    assert found.identical == found.different == ()


def test_of_functions_with_one_name_each_code_must_be_in_both() -> None:
    one, other = add(), add(instruction="S2R R78")
    both, repeated = parse(listing(one, other)), parse(listing(other, one, one))
    for text in (one, other):
        assert compare(both, parse(listing(text))).different == ("sm_90 _Z3addPf",)
    # How often each is there says how many files needed it, not what it does.
    found = compare(both, repeated)
    assert found.identical == ("sm_90 _Z3addPf",)
    assert (found.ours, found.theirs, found.instructions) == (2, 3, (6, 9))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_Z4statPf", "_Z4statPf"),
        (nested(ONE, "6hiddenEPfNS_5LocalE"), "_ZN_GLOBAL__N_6hiddenEPfNS_5LocalE"),
        (nested(OTHER, "6hiddenEPfNS_5LocalE"), "_ZN_GLOBAL__N_6hiddenEPfNS_5LocalE"),
        # The namespace before it ends with a digit, which runs into the length.
        (nested(ONE, "4deepEPf", start="_ZN6outer2"), "_ZN6outer2_GLOBAL__N_4deepEPf"),
        (nested(OTHER, "4deepEPf", start="_ZN6outer2"), "_ZN6outer2_GLOBAL__N_4deepEPf"),
        # The arguments of a template, too.
        (
            nested(ONE, nested(ONE, "4MoreEEvPfT_", start="5LocalEN"), start="_Z6open_tIN"),
            "_Z6open_tIN_GLOBAL__N_5LocalEN_GLOBAL__N_4MoreEEvPfT_",
        ),
        # With a number, which runs into the length of the name after it.
        (nested(f"{ONE}_1234", "4deepEPf"), "_ZN_GLOBAL__N_4deepEPf"),
        (nested(f"{ONE}_12", "12hidden_twiceEPf"), "_ZN_GLOBAL__N_12hidden_twiceEPf"),
        # Of a temporary file, without the hash in front.
        (nested("_GLOBAL__N__33_tmpxft_00001a2b_00000000_7_one_ii_5def0eb3", "4deepEPf"), "_ZN_GLOBAL__N_4deepEPf"),
        (nested("_INTERNAL_26f8b4ab_6_one_cu_5def0eb3", "4deepEPf"), "_ZN_INTERNAL4deepEPf"),
        # Outside of any mangled name.
        (f"table_of{ONE}", "table_of_GLOBAL__N_"),
        (f"table_of{ONE}_1234", "table_of_GLOBAL__N_"),
        # Of relocatable code.
        (
            nested(OTHER, "4deepEPf", start="__nv_static_42__cb5bc96f_20_another_name_fp32_cu_5def0eb3__ZN"),
            "__nv_static__ZN_GLOBAL__N_4deepEPf",
        ),
        ("__nv_static_27__26f8b4ab_6_one_cu_5def0eb3__Z4statPf", "__nv_static__Z4statPf"),
        ("prefix_tmpxft_00001a2b_00000000_7_one", "prefix_one"),
    ],
)
def test_names_lose_what_depends_on_the_file_or_the_run(name: str, expected: str) -> None:
    assert normalised(name) == expected


def test_names_that_differ_in_more_than_the_file_stay_different() -> None:
    names = [nested(ONE, rest) for rest in ("4deepEPf", "4heapEPf", "4deepEPd", "4deepIfEEPf")]
    names.append(nested(ONE, "4deepEPf", start="_ZN6outer2"))
    assert len({normalised(name) for name in names}) == len(names)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cuobjdump that prints the library itself, and fails at the end of a damaged one."""
    tool = tmp_path / "cuobjdump"
    tool.write_text('#!/bin/sh\ncat "$2"\nif grep -q damaged "$2"; then echo "fatal: bad fatbin" >&2; exit 1; fi\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_code, "cuobjdump", lambda: tool)
    return tmp_path


def test_libraries_are_compared_by_what_cuobjdump_prints(answers: Path) -> None:
    (answers / "ours.so").write_text(HEAD + add() + add("_Z3mulPf"))
    (answers / "theirs.so").write_text(HEAD + add())
    found = gpu_code.compare_libraries(answers / "ours.so", answers / "theirs.so")
    assert (found.identical, found.only_ours) == (("sm_90 _Z3addPf",), ("sm_90 _Z3mulPf",))
    assert gpu_code.functions(answers / "theirs.so") == {("sm_90", "_Z3addPf"): Counter({code(add()): 1})}


def test_a_library_without_machine_code_is_refused_though_it_can_be_read(answers: Path) -> None:
    (answers / "ptx.so").write_text(HEAD)
    with pytest.raises(IntegrityError, match=r"no machine code in .*ptx\.so"):
        gpu_code.functions(answers / "ptx.so")


def test_a_listing_that_broke_off_is_refused(answers: Path) -> None:
    (answers / "half.so").write_text(HEAD + add() + "damaged\n")
    with pytest.raises(IntegrityError, match=r"half\.so \(fatal: bad fatbin\)"):
        gpu_code.functions(answers / "half.so")


def test_the_real_cuobjdump_finds_no_machine_code_where_there_is_none(tmp_path: Path) -> None:
    try:
        elf.cuobjdump()
    except MachineError:
        pytest.skip("cuobjdump is not among these tools (the tools environment has it)")
    library = next(Path(psutil.__file__).parent.glob("*.so"))
    with pytest.raises(IntegrityError, match=rf"no machine code in {re.escape(str(library))} \(.+\)"):
        gpu_code.functions(library)
    (tmp_path / "text.so").write_text(HEAD + add())
    with pytest.raises(IntegrityError, match=r"text\.so"):
        gpu_code.functions(tmp_path / "text.so")
    with pytest.raises(IntegrityError, match=r"missing\.so"):
        gpu_code.functions(tmp_path / "missing.so")
