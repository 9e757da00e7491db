"""compare and gate: what counts as a change, and what is named."""

import json
import math
import random

import pytest

from benchmarks.__main__ import main
from benchmarks.reporting.changes import FASTER, SLOWER, WITHIN, compare_text, gate, ratio_changes, time_changes
from benchmarks.reporting.records import parse_record
from tests.support.benchmark_records import make_record, scaled


def read(data, name="r"):
    return parse_record(name, json.dumps(data))


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.3, SLOWER), (1 / 1.3, FASTER), (1.04, WITHIN), (1 / 1.04, WITHIN), (1.0, WITHIN)]
)
def test_verdict_of_quiet_records(factor, verdict):
    record = make_record(spread=1.01)
    changes = time_changes(read(record), read(scaled(record, factor)))
    assert {change.verdict for change in changes if change.contender == "ours"} == {verdict}
    assert {change.verdict for change in changes if change.contender != "ours"} == {WITHIN}


def test_noise_of_a_comparison_is_the_two_spreads_in_quadrature():
    record = make_record(spread=1.2)
    bound = math.exp(math.sqrt(2) * math.log(1.2))
    for factor, verdict in ((bound * 0.999, WITHIN), (bound * 1.001, SLOWER)):
        changes = time_changes(read(record), read(scaled(record, factor)))
        assert {change.verdict for change in changes if change.contender == "ours"} == {verdict}


def test_comparison_names_what_only_one_record_has():
    a, b = make_record(), make_record(operators=("swiglu", "rotary"))
    text = compare_text(read(a), read(b))
    assert "only in A: rms_norm forward [8, 64], warm caches" in text
    assert "only in B: rotary forward+backward [8, 64], warm caches" in text


def test_comparison_of_different_machines_says_so():
    a = make_record()
    text = compare_text(read(a), read(a | {"threads": 4}))
    assert "measured differently" in text
    assert "threads: 2 and 4" in text


@pytest.mark.parametrize("spread", [1.0, 1.05, 2.0])
def test_a_record_passes_against_itself(spread):
    record = read(make_record(spread=spread))
    passed, text = gate(record, record)
    assert passed
    assert "4 ratios: 0 worse, 0 better, 4 within noise" in text
    assert ("4 bounds are wider than 1.5x" in text) == (spread == 2.0)


def test_a_slower_machine_passes():
    record = make_record()
    slow = record
    for contender in ("ours", "eager", "torch.compile"):
        slow = scaled(slow, 1.7, contender)
    assert gate(read(slow), read(record))[0]


def test_worse_ratios_are_listed():
    record = make_record()
    passed, text = gate(read(scaled(record, 1.5, operator="swiglu")), read(record))
    assert not passed
    lines = [line for line in text.splitlines() if line.startswith("worse: ")]
    assert len(lines) == 2
    assert all("swiglu" in line and "1.50x" in line for line in lines)


def test_one_peer_that_became_faster_is_no_fault_of_ours():
    record = make_record()
    assert gate(read(scaled(record, 0.5, contender="eager")), read(record))[0]
    both = scaled(scaled(record, 0.5, contender="eager"), 0.5, contender="torch.compile")
    assert not gate(read(both), read(record))[0]


def test_bound_of_the_gate_is_the_four_spreads_in_quadrature():
    record = make_record(spread=1.1)
    bound = math.exp(2 * math.log(1.1))
    assert gate(read(scaled(record, bound * 0.999)), read(record))[0]
    assert not gate(read(scaled(record, bound * 1.001)), read(record))[0]


def test_least_bound_is_five_percent():
    record = make_record(spread=1.0)
    assert gate(read(scaled(record, 1.049)), read(record))[0]
    assert not gate(read(scaled(record, 1.051)), read(record))[0]


def test_without_eager_the_first_shared_peer_is_the_reference():
    record = make_record()
    for case in record["cases"]:
        del case["contenders"]["eager"]
    compared = ratio_changes([read(record)], read(record))
    assert {change.reference for change in compared.agreed} == {"torch.compile"}
    assert not compared.alone
    lonely = make_record()
    for case in lonely["cases"]:
        case["contenders"] = {"ours": case["contenders"]["ours"]}
    passed, text = gate(read(lonely), read(lonely))
    assert not passed
    assert "no peer in common: rms_norm forward [8, 64]" in text


def test_a_missing_case_of_a_measured_operator_fails_and_an_operator_not_measured_is_named():
    record = make_record()
    passed, text = gate(read(record | {"cases": record["cases"][1:]}), read(record))
    assert not passed
    assert "missing: rms_norm forward [8, 64], warm caches" in text
    passed, text = gate(read(record | {"cases": record["cases"][2:]}), read(record))
    assert passed
    assert "not measured: rms_norm" in text


def test_nothing_in_common_fails():
    passed, text = gate(read(make_record(operators=("rotary",))), read(make_record()))
    assert not passed
    assert "no ratio could be compared" in text


OPERATORS = tuple(f"operator{i}" for i in range(12))


def runs(count, sigma=0.1, seed=0, record=None):
    """Runs of one commit: every operator's ratio of a run lies `sigma` beside the true one."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        run = record or make_record(operators=OPERATORS)
        for operator in OPERATORS:
            run = scaled(run, math.exp(draw.gauss(0, sigma)), operator=operator)
        found.append(read(run))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_another_run_of_the_same_commit_passes(seed):
    *baselines, record = runs(4, seed=seed)
    passed, text = gate(record, *baselines)
    assert passed, text
    assert "as a whole:" in text
    alone, text = gate(record, baselines[0])
    assert not alone, "the spreads alone would take another run for a change"
    assert "how much runs of one commit differ is not in the bounds" in text


@pytest.mark.parametrize("seed", range(5))
def test_a_fifth_slower_everywhere_fails_as_a_whole(seed):
    *baselines, record = runs(4, seed=seed)
    slower = runs(4, seed=seed, record=scaled(make_record(operators=OPERATORS), 1.2))[-1]
    passed, text = gate(slower, *baselines)
    assert not passed
    assert "worse as a whole: 1." in text
    assert gate(record, *baselines)[0]


def test_a_fifth_beyond_the_noise_fails_in_a_single_operator():
    baselines = runs(4, sigma=0.02)[:3]
    slower = runs(4, sigma=0.02, record=scaled(make_record(operators=OPERATORS), 1.2, operator="operator3"))[-1]
    passed, text = gate(slower, *baselines)
    assert not passed
    lines = [line for line in text.splitlines() if line.startswith("worse: ")]
    assert lines
    assert all("operator3" in line for line in lines)


def test_sigma_is_the_deviation_between_runs():
    record = make_record(operators=("rms_norm", "swiglu"))
    pair = [read(scaled(record, factor, operator="rms_norm")) for factor in (1.0, 1.5)]
    changes = [usual for usual, *_ in ratio_changes(pair, pair[0]).changes]
    sigma = math.log(1.5) / math.sqrt(2)
    (norm, *_), spread = [c for c in changes if c.case.operator == "rms_norm"], math.log(1.02)
    # Two spreads of each of three runs: those of the baseline count half.
    assert norm.noise == pytest.approx(math.sqrt(3 * spread**2 + 9 * sigma**2 * 1.5), rel=1e-2)
    assert norm.before == pytest.approx(norm.after * math.sqrt(1.5))


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["benchmarks", *map(str, arguments)])
    return main()


def test_commands_and_their_exit_codes(tmp_path, monkeypatch, capsys):
    paths = {"a": make_record(), "slow": scaled(make_record(), 2.0), "threads": make_record() | {"threads": 8}}
    for name, record in paths.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(record))
    assert run(monkeypatch, "gate", paths["a"], "--against", paths["a"]) == 0
    assert capsys.readouterr().out.endswith("passed\n")
    assert run(monkeypatch, "gate", paths["slow"], "--against", paths["a"]) == 1
    assert run(monkeypatch, "gate", paths["slow"], "--against", paths["a"], paths["slow"]) == 0
    assert run(monkeypatch, "gate", paths["threads"], "--against", paths["a"]) == 2
    assert "threads: 2 and 8" in capsys.readouterr().err
    assert run(monkeypatch, "gate", tmp_path / "none.json", "--against", paths["a"]) == 2
    assert "neither a file nor a record in benchmarks/results" in capsys.readouterr().err
    assert run(monkeypatch, "compare", paths["a"], paths["slow"]) == 0
    out = capsys.readouterr().out
    assert "ours : 0 faster, 4 slower, 0 within noise; median B/A 2.00x" in out
    assert "peers: 0 faster, 0 slower, 8 within noise; median B/A 1.00x" in out
