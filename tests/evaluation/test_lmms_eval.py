"""The plug-in for lmms-eval, and a run of that program over two local parquet tasks where it is installed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dreamllm.documents import PLAIN
from tests.evaluation.folders import picture, text_of
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent.parent
YES_NO = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
task: {name}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.score
generation_kwargs: {{max_new_tokens: 6, num_beams: {beams}, temperature: 0, do_sample: false}}
metric_list: [{{metric: answered, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
"""
UTILS = """
def pictures(doc):
    return [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def score(doc, results):
    return {"answered": float(isinstance(results[0], str))}
"""


def entry_point():
    section = (ROOT / "pyproject.toml").read_text().partition('[project.entry-points."lmms_eval.models"]')[2]
    return re.search(r'^dreamllm = "(.+)"$', section, re.MULTILINE)[1]


def needs_lmms_eval():
    for package in ("lmms_eval", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def test_the_entry_point_names_the_manifest():
    module, _, name = entry_point().partition(":")
    assert name == "MANIFEST"
    assert importlib.util.find_spec(module) is not None


def test_settings_and_prompts_of_tasks_are_understood():
    needs_lmms_eval()
    from dreamllm.evaluation.harness.lmms_eval_model import cut, decoding_of, document_of

    decoding = decoding_of({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False})
    assert (decoding.beams, decoding.max_new_tokens, decoding.temperature) == (1, 16, 0.0)
    sampled = decoding_of({"temperature": 0.5, "top_p": 0.9})
    assert (sampled.temperature, sampled.top_p, sampled.max_new_tokens) == (0.5, 0.9, 1024)
    with pytest.warns(UserWarning, match="does not use the task's settings image_aspect_ratio"):
        decoding_of({"image_aspect_ratio": "pad"})
    two = [picture(1), picture(2)]
    assert text_of(document_of("What?", two, PLAIN, "")) == "USER: <image><image>What? ASSISTANT:"
    assert text_of(document_of("A <image> or <image>?", two, PLAIN, "")) == "USER: A <image> or <image>? ASSISTANT:"
    assert cut("yes\nno", ["\n", "."]) == "yes"
    assert cut("yes", "") == "yes"


def test_lmms_eval_runs_two_local_tasks(tmp_path):
    needs_lmms_eval()
    datasets = pytest.importorskip("datasets")
    model, processor = tiny_model(tmp_path / "parts")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS)
    for name, beams in (("greedy_local", 1), ("beams_local", 2)):
        rows = {"image": [picture(i) for i in range(3)], "question": ["a license?"] * 3, "answer": ["yes"] * 3}
        features = datasets.Features(
            image=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string")
        )
        data = tasks / f"{name}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(data))
        (tasks / f"{name}.yaml").write_text(YES_NO.format(name=name, data=data, beams=beams))
    installed = tmp_path / "installed" / "dreamkernels-0.dist-info"  # as pip would write it
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: dreamkernels\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(f"[lmms_eval.models]\ndreamllm = {entry_point()}\n")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{installed.parent}", **offline}
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "dreamllm", "--model_args", f"pretrained={tmp_path / 'model'}",
        "--include_path", str(tasks), "--tasks", "greedy_local,beams_local", "--batch_size", "2", "--device", "cpu",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("*results.json")
    results = json.loads(path.read_text())["results"]
    assert {name: results[name]["answered,none"] for name in results} == {"greedy_local": 1.0, "beams_local": 1.0}
