"""Logs of failed builds and imports: the right cause first, no wrong one ever, any size, any bytes."""

from __future__ import annotations

import gzip
import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from log_texts import KNOWN, UNRELATED
from ssm_forge.doctor import logs
from ssm_forge.doctor.rules import SEVERITIES, Rule, load

SCRIPTS = Path(__file__).parents[3] / "scripts"
OF_LOGS = [rule for rule in load().values() if rule.match]
LINE = b"[1/9] nvcc -c -gencode arch=compute_80,code=sm_80 csrc/selective_scan_fwd_fp32.cu -o selective_scan_fwd.o\n"


def codes(text: str) -> list[str]:
    return [hit.rule.code for hit in logs.search(io.BytesIO(text.encode())).hits]


@pytest.mark.parametrize("rule", OF_LOGS, ids=lambda rule: rule.code)
def test_each_rule_names_what_its_own_example_shows(rule: Rule) -> None:
    assert codes(f"Collecting x\n{rule.see}\nmore") == [rule.code]


@pytest.mark.parametrize("rule", load().values(), ids=lambda rule: rule.code)
def test_each_rule_is_told_whole_in_both_languages(rule: Rule) -> None:
    assert rule.severity in SEVERITIES
    for text in (*rule.cause.values(), *rule.fix.values()):
        assert text.endswith((".", "。"))
    assert set(rule.cause) == set(rule.fix) == {"en", "zh"}
    assert set(rule.yields_to) <= set(load())
    assert bool(rule.match) == bool(rule.needles) == bool(rule.see)
    assert rule.since


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_cause_is_named_first(name: str) -> None:
    text, expected = KNOWN[name]
    assert codes(text) == expected


@pytest.mark.parametrize("name", UNRELATED)
def test_an_unrelated_failure_gets_no_cause(name: str) -> None:
    reading = logs.search(io.BytesIO(UNRELATED[name].encode()))
    assert reading.hits == []


def test_there_are_sixty_texts() -> None:
    assert len(KNOWN) == len(UNRELATED) == 30


def test_the_line_is_told_with_its_number() -> None:
    (hit,) = logs.recognise("one\ntwo\r\n\x1b[31mIndexError: map::at\x1b[0m\nfour")
    assert (hit.line, hit.text) == (3, "IndexError: map::at")


def test_an_unknown_failure_is_seen_as_one() -> None:
    reading = logs.search(io.BytesIO(b"fine\nFooError: never seen before\n" + LINE))
    assert (reading.hits, reading.failed, reading.last_error) == ([], True, "FooError: never seen before")
    assert not logs.search(io.BytesIO(LINE * 20)).failed


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "gb18030"])
def test_logs_of_other_encodings_are_read(encoding: str) -> None:
    text = "正在编译 …\nRuntimeError: CUDA error: no kernel image is available for execution on the device\n编译失败\n"
    reading = logs.search(io.BytesIO(text.encode(encoding, "replace")))
    assert [hit.rule.code for hit in reading.hits] == ["no-kernel-image"]


def test_a_notebooks_file_is_read() -> None:
    lines = ["\x1b[0;31mModuleNotFoundError\x1b[0m: No module named \x1b[1m'selective_scan_cuda'\x1b[0m"]
    cell = {"outputs": [{"output_type": "error", "ename": "ModuleNotFoundError", "traceback": lines}]}
    assert codes(json.dumps({"cells": [cell]}, indent=1)) == ["kernels-missing"]


def test_a_cause_across_two_blocks_is_found() -> None:
    said = b"The detected CUDA version (11.5) mismatches the version that was used to compile\nPyTorch (12.1)"
    for shift in (5, 40, 90):
        filler = LINE * (1 + (1 << 20) // len(LINE))
        text = filler[: (1 << 20) - shift] + said + LINE * 10
        assert [hit.rule.code for hit in logs.search(io.BytesIO(text)).hits] == ["toolkit-mismatch"]


def test_a_packed_log_and_one_cut_short_are_read(tmp_path: Path) -> None:
    whole = gzip.compress(random.Random(1).randbytes(30_000).hex().encode() + b"\nIndexError: map::at\n", 1)
    log = tmp_path / "log.gz"
    log.write_bytes(whole)
    assert [hit.rule.code for hit in logs.read(str(log)).hits] == ["triton-on-turing"]
    log.write_bytes(whole[:-400])
    assert logs.read(str(log)).hits == []


@pytest.mark.parametrize(
    ("noise", "binary"),
    [(bytes(70_000), True), (random.Random(7).randbytes(3 << 20), True), (b"\x1b[" * 9999, False), (b"", False)],
    ids=["zeros", "random", "escapes", "nothing"],
)
def test_noise_gives_nothing(noise: bytes, binary: bool) -> None:
    reading = logs.search(io.BytesIO(noise))
    assert reading.hits == []
    assert reading.binary is binary


_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (200 << 20, 200 << 20))
from ssm_forge.doctor import logs
reading = logs.read(sys.argv[1])
print(reading.bytes, *(hit.rule.code for hit in reading.hits))
"""


def test_a_log_of_200_megabytes_takes_little_memory(tmp_path: Path) -> None:
    log = tmp_path / "huge.log"
    # Every line differs, and each second one looks like a failure.
    pair = (
        LINE.replace(b"1/9", b"%d/9") + b"a%d.h(12): warning #177-D: variable 'error' was not found, never referenced\n"
    )
    block = b"".join(pair % (number, number) for number in range(10_000_000 // len(pair)))
    block += LINE * ((10_000_000 - len(block)) // len(LINE))
    with log.open("wb") as stream:
        for number in range(21):
            stream.write(block)
            if number == 10:
                stream.write(b"g++: fatal error: Killed signal terminated program cc1plus\n")
    command = [sys.executable, "-c", _LIMITED, str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SCRIPTS)
    size, *found = done.stdout.split()
    assert int(size) == log.stat().st_size > 200_000_000
    assert found == ["build-out-of-memory"]
    log.unlink()


def test_in_a_long_log_lines_are_still_counted(tmp_path: Path) -> None:
    filler = LINE * ((12 << 20) // len(LINE))
    reading = logs.search(io.BytesIO(filler + b"IndexError: map::at\n" + LINE * 9), 1 << 30)
    assert [(hit.rule.code, hit.line) for hit in reading.hits] == [("triton-on-turing", filler.count(b"\n") + 1)]


def test_where_time_runs_out_the_end_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 10_000, 2))
    monkeypatch.setattr(time, "process_time", lambda: next(ticks))
    text = LINE * ((20 << 20) // len(LINE)) + b"IndexError: map::at\n" + LINE * 9
    reading = logs.search(io.BytesIO(text))
    assert [(hit.rule.code, hit.line) for hit in reading.hits] == [("triton-on-turing", 0)]
    assert 0 < reading.skipped < reading.bytes == len(text)
