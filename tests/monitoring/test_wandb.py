"""Weights & Biases, offline: what its own file of a run holds."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from pathlib import Path

import pytest

from dreamllm.monitoring import LogSettings, SampleSettings, watching
from tests.monitoring.test_monitoring import line

WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
BLOCK = 32768


def records(path: Path) -> list:
    """The messages of a .wandb file: LevelDB's log format, with a header of seven bytes, of protobuf records."""
    kind = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    data, position, pending, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, part = struct.unpack_from("<IHB", data, position)
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        assert part in (WHOLE, FIRST, MIDDLE, LAST)
        if part in (WHOLE, LAST):
            found.append(kind.FromString(pending))
            pending = b""
    return found


@pytest.fixture
def offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "run"


def log(run: Path, *lines) -> None:
    """What a run with the switch on does, in a main process of its own."""
    (observer,) = watching(
        run, SampleSettings(), LogSettings(wandb="dreams"), {"seed": 7, "stages": [{"name": "one"}]}
    )(True)
    for number, each in enumerate(lines):
        observer.line(each)
        assert not observer.needs_model(number)
    observer.close()
    importlib.import_module("wandb").teardown()  # as when a process ends: its service has then written everything


def test_every_line_is_in_the_runs_own_file_and_a_resumed_run_goes_on_under_its_name(offline):
    offline.mkdir()
    log(offline, line("one", 10), line("one", 20), line("two", 10, vm_loss=None))
    (offline / "wandb").rename(offline / "before")  # folders are named by the second
    log(offline, line("two", 20))
    files = [file for part in ("before", "wandb") for file in offline.glob(f"{part}/offline-run-*/*.wandb")]
    name = (offline / "wandb_id").read_text()
    assert {file.name for file in files} == {f"run-{name}.wandb"}
    found = [record for file in files for record in records(file)]
    runs = [record.run for record in found if record.HasField("run")]
    assert {(run.project, run.run_id, run.display_name) for run in runs} == {("dreams", name, "run")}
    config = {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in runs[0].config.update}
    assert config["seed"] == 7
    history = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    assert [(row.get("one/step"), row.get("two/step")) for row in history] == [
        (10, None),
        (20, None),
        (None, 10),
        (None, 20),
    ]
    assert history[1]["one/lm_loss"] == line("one", 20)["lm_loss"]
    assert "two/vm_loss" not in history[2]
    steps = {record.metric.glob_name: record.metric.step_metric for record in found if record.HasField("metric")}
    assert steps.get("one/*") == "one/step"


def test_other_processes_log_nothing(offline):
    assert watching(offline, SampleSettings(), LogSettings(wandb="dreams"), {})(False) == []


def test_wandb_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        log(tmp_path)
