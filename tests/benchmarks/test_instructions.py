"""Instruction counts: what is read from callgrind, and what counts as worse."""

import copy
import json

import pytest

from benchmarks.__main__ import main
from benchmarks.reporting import instructions
from benchmarks.reporting.instructions import compare_instructions, count_instructions

DUMP = """\
desc: Trigger: dump rms_norm
events: Ir
ob=(1) /usr/lib/libc.so.6
fn=(1) memcpy
10 700
cob=(2) /somewhere/dreamkernels/_cpu.abi3.so
cfn=(2) 0x10
calls=1 0
11 5000
+3 40
ob=(2)
fn=(2) 0x10
0 1000
+4 200
cob=(1)
cfn=(1)
calls=3 10
* 900
-2 30
ob=(3) /somewhere/dreamkernels/_cuda.abi3.so
fn=(3)
5 60
"""
COUNTS = {"compiler": "g++ 12", "counts": {"rms_norm": 10_000, "swiglu": 5_000}}


def test_only_the_library_itself_is_counted():
    assert count_instructions(DUMP.splitlines(keepends=True)) == 1000 + 200 + 30


@pytest.mark.parametrize(("count", "passes"), [(10_000, True), (10_199, True), (10_201, False), (8_000, True)])
def test_two_percent_more_are_worse(count, passes):
    found = copy.deepcopy(COUNTS)
    found["counts"]["rms_norm"] = count
    passed, text = compare_instructions(found, COUNTS)
    assert passed == passes
    assert ("worse: rms_norm" in text) == (not passes)


def test_an_operator_that_one_side_lacks_fails():
    fewer = {**COUNTS, "counts": {"rms_norm": 10_000}}
    assert "swiglu: only in the baseline" in compare_instructions(fewer, COUNTS)[1]
    assert not compare_instructions(fewer, COUNTS)[0]
    assert not compare_instructions(COUNTS, fewer)[0]


def test_counts_of_another_compiler_are_refused():
    with pytest.raises(ValueError, match="recorded with g\\+\\+ 12, this build is by clang"):
        compare_instructions({**COUNTS, "compiler": "clang"}, COUNTS)


def test_recorded_counts_are_those_of_the_workload():
    assert set(json.loads(instructions.BASELINE.read_text())["counts"]) == set(instructions._workload())


def test_without_valgrind_the_command_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["benchmarks", "gate", "--instructions"])
    assert main() == 2
    assert "apt install valgrind" in capsys.readouterr().err


def test_gate_without_anything_to_do_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "gate"])
    assert main() == 2
    assert "RECORD and --against BASELINE" in capsys.readouterr().err
