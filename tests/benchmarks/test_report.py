"""The report shows what the records say, and says what they lack."""

import argparse
import json
import math
import re
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.extrapolation import extrapolations
from benchmarks.harness import Case, Part, Result, Timing
from benchmarks.reporting.history import committed_versions, trends
from benchmarks.reporting.records import load_record, parse_record
from benchmarks.reporting.report import as_html, as_markdown, make_section, write_report
from benchmarks.reporting.static import static_report
from benchmarks.reporting.tables import absent_peers, markdown_text, microseconds, operator_table, times
from benchmarks.running import run
from benchmarks.timing import Times
from tests.support.benchmark_records import make_record, scaled

VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """Cells and texts of a page; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.texts, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if "td" in self.open:
            self.cells[-1] += data


def written(folder, record, name="machine"):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record))
    return path


def page_of(folder, record):
    section = make_section(written(folder, record))
    return as_html([section]), as_markdown([section])


def test_every_time_and_ratio_of_the_record_is_in_the_page_and_in_the_text(tmp_path):
    record = make_record(seed=3)
    html, markdown = page_of(tmp_path, record)
    cells = Page(html).cells
    for case in record["cases"]:
        ours = case["contenders"]["ours"]["minimum_us"]
        expected = [case["case"], microseconds(ours)]
        expected.append(f"{100 * case['copy_minimum_us'] / ours:.0f}%")
        for peer in ("eager", "torch.compile"):
            theirs = case["contenders"][peer]["minimum_us"]
            expected.append(f"{microseconds(theirs)} ({times(theirs / ours)})")
        assert set(expected) <= set(cells)
        assert all(markdown_text(text) in markdown for text in expected)


def test_figures_are_those_of_the_definitions():
    case = make_record()["cases"][0] | {"bytes_moved": 3_000_000, "flops": 24_000_000, "copy_minimum_us": 150.0}
    case["contenders"] = {
        "ours": {"minimum_us": 200.0, "median_us": 250.0},
        "eager": {"minimum_us": 500.0, "median_us": 510.0},
    }
    read = parse_record("r", json.dumps({"cases": [case]})).cases[0]
    assert read.times_as_fast_as("eager") == 2.5
    assert read.flops_per_byte == 8
    assert read.gflops("ours") == pytest.approx(120)
    assert read.gflops("eager") == pytest.approx(48)
    assert read.copy_gb_per_second == pytest.approx(20)
    row = operator_table([read]).rows[0]
    assert list(row) == [case["case"], "200.0", "+25%", "500.0 (2.50x)", "75%", "120"]


def test_what_was_extrapolated_is_shown_apart_and_called_so(tmp_path):
    def of_layers(n):
        part, contenders = Part("layers", n, 32), {"ours": n, "original pattern": 3 * n}
        case = Case("7b stage2", f"{part.note}8 documents", list, dict.fromkeys(contenders, list), 0, 0, 0.0, part=part)
        timings = [Timing(name, Times(us, us, us, us, 5)) for name, us in contenders.items()]
        return Result(case, copy_minimum_us=1.0, timings=timings)

    results = [of_layers(2), of_layers(6)]
    record = make_record() | {"extrapolations": [found.record() for found in extrapolations(results)]}
    record["cases"] += [result.record() for result in results]
    html, markdown = page_of(tmp_path, record)
    page = Page(html)
    assert "Extrapolated, not measured" in page.texts
    assert "### Extrapolated, not measured" in markdown
    assert "extrapolated, not measured" in page.texts  # of the figures' own column
    rows = [row for row in markdown.splitlines() if "2 and 6 of 32 layers" in row]
    assert [row.split("|")[-2].strip() for row in rows] == ["-", "3.00x"]
    assert "7b stage2, ours: 8 documents" in page.cells
    measured = parse_record("r", json.dumps(record)).cases
    assert {case.label for case in measured if case.operator == "7b stage2"} == {
        "2 of 32 layers, 8 documents",
        "6 of 32 layers, 8 documents",
    }
    without = page_of(tmp_path, make_record())
    assert not any("xtrapolated" in text for text in without)


def test_bars_have_lengths_in_proportion_to_the_logarithm_and_slower_ones_point_left(tmp_path):
    record = make_record(operators=("rms_norm",))
    ratios = (4.0, 0.5, 2.0, 16.0)
    peers = [case["contenders"][peer] for case in record["cases"] for peer in ("eager", "torch.compile")]
    for case in record["cases"]:
        case["contenders"]["ours"]["minimum_us"] = 100.0
    for peer, ratio in zip(peers, ratios, strict=True):
        peer["minimum_us"] = peer["median_us"] = 100 * ratio
    tags = Page(page_of(tmp_path, record)[0]).tags
    bars = [attributes for tag, attributes in tags if tag == "rect" and attributes.get("class", "").startswith("bar")]
    unit = float(bars[0]["width"]) / math.log(4)
    assert [float(bar["width"]) for bar in bars] == pytest.approx([unit * abs(math.log(r)) for r in ratios], abs=0.2)
    slower = [bar for bar in bars if "slower" in bar["class"]]
    assert len(slower) == 1
    assert float(slower[0]["x"]) + float(slower[0]["width"]) == pytest.approx(float(bars[0]["x"]), abs=0.2)


def test_points_of_the_roofline_stand_where_the_axes_say(tmp_path):
    tags = Page(page_of(tmp_path, make_record(seed=5))[0]).tags
    marks = [attributes for tag, attributes in tags if tag == "circle" and attributes.get("r") == "4"]
    record = parse_record("r", json.dumps(make_record(seed=5)))
    expected = [
        (math.log10(case.flops_per_byte), math.log10(case.gflops(contender)))
        for case in record.cases
        if case.operator == "rms_norm"
        for contender in ("eager", "ours")
    ]
    found = [(float(mark["cx"]), float(mark["cy"])) for mark in marks if mark["cx"] != "6.0"]
    (x0, y0), (x1, _) = expected[0], expected[2]
    across = (found[2][0] - found[0][0]) / (x1 - x0)
    up = (found[1][1] - found[0][1]) / (expected[1][1] - y0)
    assert across > 0
    assert up < 0
    for (x, y), (cx, cy) in zip(expected, found, strict=False):
        assert cx == pytest.approx(found[0][0] + across * (x - x0), abs=0.3)
        assert cy == pytest.approx(found[0][1] + up * (y - y0), abs=2.0)


def test_page_is_self_contained(tmp_path):
    page = Page(page_of(tmp_path, make_record())[0])
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("href", "src")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\(|@import", "".join(page.texts))


def test_names_are_escaped(tmp_path):
    record = make_record(operators=("<b>norm</b>",))
    record["cases"][0]["case"] = "a|b <script>alert(1)</script> *x*"
    record["cases"][0]["contenders"]["<i>"] = {"minimum_us": 1.0, "median_us": 2.0}
    record["devices"]["cpu"] = "<u>cpu</u> & more"
    html, markdown = page_of(tmp_path, record)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"b", "script", "u"}
    assert "a|b <script>alert(1)</script> *x*" in page.cells
    assert "<script" not in markdown
    assert r"a\|b &lt;script>alert(1)&lt;/script> \*x\*" in markdown


def test_what_a_record_lacks_is_said(tmp_path):
    record = {"cases": make_record()["cases"]}
    for case in record["cases"]:
        for field in ("caches", "device", "bytes_moved", "flops", "copy_minimum_us"):
            del case[field]
        case["failures"] = {"flash": "RuntimeError: no such thing"}
    html, markdown = page_of(tmp_path, record)
    assert "not recorded" in html
    assert "Roofline" not in html
    assert "flash: RuntimeError: no such thing." in markdown
    assert "No history:" in html


def test_a_peer_that_was_timed_somewhere_has_a_column_with_reasons(tmp_path):
    record = make_record(operators=("rms_norm",))
    first, second = record["cases"]
    first["failures"] = {"liger": "needs a GPU", "cut": "not installed"}
    second["failures"] = {"cut": "not installed"}
    second["contenders"]["liger"] = {"minimum_us": 3.0, "median_us": 4.0}
    cases = parse_record("r", json.dumps(record)).cases
    table = operator_table(cases)
    assert "liger, us" in table.header
    assert not any("cut" in name for name in table.header)
    assert "not timed: needs a GPU" in table.rows[0]
    assert absent_peers(cases) == ["cut: not installed."]


def test_samples_memory_and_reference_of_a_workload():
    """The pattern is what ratios are taken against, not our own second way that comes before it."""
    contenders = {
        "ours": {"minimum_us": 8e5, "median_us": 1e6, "seconds_per_sample": 0.125, "peak_extra_bytes": 5_000_000},
        "ours, slower": {"minimum_us": 9e5, "median_us": 1e6, "seconds_per_sample": 0.2, "peak_extra_bytes": 2_000_000},
        "original pattern": {"minimum_us": 2e6, "median_us": 2e6, "seconds_per_sample": 0.25},
    }
    case = {"operator": "mini stage2", "case": "8 documents", "bytes_moved": 0, "flops": 0, "copy_minimum_us": 1.0}
    (read,) = parse_record("r", json.dumps({"cases": [case | {"contenders": contenders}]})).cases
    assert read.reference == "original pattern"
    table = operator_table([read])
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert cells["ours, ms per sample"] == "100.0"
    assert cells["samples per second"] == "10.00"
    assert cells["original pattern, ms per sample"] == "250.0 (2.50x)"
    assert cells["memory of ours, MB"] == "5.0"
    assert cells["memory of ours, slower, MB"] == "2.0"
    assert not {"of copy bandwidth", "GFLOP/s", "memory of original pattern, MB"} & set(cells)


def test_what_was_wrong_is_on_the_page(tmp_path):
    told = {"errors": {"swiglu [8, 64]": "AssertionError: differ"}, "not_here": {"dreamllm": "on the CPU only"}}
    html, markdown = page_of(tmp_path, make_record() | told)
    for text in (html, markdown):
        assert "AssertionError: differ" in text
        assert "Not run: dreamllm: on the CPU only" in text
    assert 'class="problem"' in html


def test_limits_are_drawn_only_where_measured(tmp_path):
    record = make_record()
    html, _ = page_of(tmp_path, record)
    assert "no measured limit of arithmetic" in html
    html, _ = page_of(tmp_path, record | {"limits": {"matmul_gflops": {"float32": 123.0}}})
    assert "matrix product float32, 123 GFLOP/s" in html
    assert "no measured limit of arithmetic" not in html


def test_what_a_run_records_is_what_the_report_reads(tmp_path, monkeypatch, capsys):
    case = Case(
        operator="double",
        label="float32 [1000]",
        make_inputs=lambda: [torch.rand(1000)],
        contenders={"ours": lambda x: x * 2, "eager": lambda x: x + x},
        bytes_moved=8000,
        flops=1000,
        relative_tolerance=0.0,
    )
    module = SimpleNamespace(cases=lambda device, size: [case], boundary=lambda device: {"x + x": 1.25})
    (tmp_path / "results").mkdir()
    monkeypatch.setattr("benchmarks.running.ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.running.chosen", lambda names, exactly: {"double": module})
    monkeypatch.setattr("benchmarks.timing.matmul_gflops", lambda device: {"float32": 12.34})
    threads = torch.get_num_threads()
    arguments = {"names": [], "device": "cpu", "size": "small", "caches": "warm", "threads": threads, "seconds": 0.01}
    assert run(argparse.Namespace(**arguments, rounds=9, compile=True, only=None, exactly=False, record="tiny")) == 0
    record = load_record(tmp_path / "results" / "tiny.json")
    (read,) = record.cases
    assert (read.name, read.flops, read.bytes_moved) == ("double float32 [1000], warm caches", 1000, 8000)
    assert list(read.contenders) == ["ours", "eager"]
    assert record.matmul_gflops == {"float32": 12.3}
    assert record.boundary_us == {"double": {"x + x": 1.25}}
    facts = dict(record.environment())
    assert (facts["threads"], facts["caches"]) == (str(threads), "warm")
    assert microseconds(read.contenders["ours"].minimum_us) in as_markdown(
        [make_section(tmp_path / "results/tiny.json")]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "no list of cases"),
        ('{"cases": [{"operator": "a", "case": "b"}]}', "case 0: .*contenders"),
        ('{"cases": [{"operator": "a", "case": "b", "contenders": {}}]}', "at least one contender"),
        ('{"cases": [{"operator": "a", "case": "b", "contenders": {"ours": {"minimum_us": 1}}}]}', "median_us"),
    ],
)
def test_what_is_no_record_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_record("r", text)


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_history_is_the_geometric_mean_over_shared_cases_of_committed_versions(tmp_path):
    git(tmp_path, "init", "-q")
    first = make_record(seed=1, operators=("rms_norm",))
    later = scaled(first, 0.5)
    more = later | {"cases": [*later["cases"], *make_record(seed=2, operators=("rotary",))["cases"]]}
    other = scaled(first, 3.0) | {"threads": 1}
    for number, record in enumerate((first, other, more)):
        path = written(tmp_path, record | {"commit": f"measured{number}"})
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-q", "-m", f"record {number}")
    versions = committed_versions(path)
    assert len(versions) == 3
    (trend,) = trends(versions)
    assert (trend.operator, trend.reference, trend.cases) == ("rms_norm", "eager", 2)
    ratios = [
        case["contenders"]["eager"]["minimum_us"] / case["contenders"]["ours"]["minimum_us"] for case in first["cases"]
    ]
    mean = math.sqrt(ratios[0] * ratios[1])
    assert [ratio for _, _, ratio in trend.points] == pytest.approx([mean, 2 * mean])
    assert [commit for commit, _, _ in trend.points] == ["measured0", "measured2"]
    html = as_html([make_section(path)])
    assert 'class="trends"' in html
    assert all(any(commit in cell for cell in Page(html).cells) for commit, _, _ in trend.points)


def test_without_git_the_page_says_so(tmp_path, monkeypatch):
    path = written(tmp_path, make_record())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make_section(path).history == "No history: git is not installed."


def test_static_report_has_every_kernel_of_the_baseline(tmp_path):
    table, note = static_report("sm_80")
    configurations = sum(int(row[1]) for row in table.rows)
    assert f"{configurations} compiled configurations for sm_80" in note
    used = {row[0]: row[-1] for row in table.rows}
    assert used["decode_attention (triton)"] not in ("-", "0")
    assert used["rms_norm (triton)"] == "-"
    assert static_report("sm_80", tmp_path) is None


def test_command_writes_both_files_and_names_what_it_left_out(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    results.mkdir()
    written(results, make_record())
    (results / "other.json").write_text("{}")
    monkeypatch.setattr("benchmarks.reporting.commands.RESULTS", results)
    monkeypatch.setattr("sys.argv", ["benchmarks", "report", "--out", str(tmp_path / "out")])
    assert main() == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "out" / name) for name in ("report.md", "report.html")
    ]
    assert "Left out: other has no list of cases" in (tmp_path / "out" / "report.html").read_text()


def test_committed_records_make_a_page(tmp_path):
    from benchmarks.reporting.commands import all_records

    paths, _ = all_records()
    _, html = write_report(paths, tmp_path)
    page = Page(html.read_text())
    for path in paths:
        for case in load_record(path).cases:
            ours = case.contenders[case.ours]
            seconds = ours.least_seconds_per_sample
            assert (f"{1e3 * seconds:,.1f}" if seconds else microseconds(ours.minimum_us)) in page.cells
