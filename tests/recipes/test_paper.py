"""The paper's stages: their settings, where data are looked for, the dry run, and a real run at tiny size."""

import json
import re

import pytest

from dreamllm.cli import main
from dreamllm.model import DreamLLM
from dreamllm.monitoring import read_samples
from dreamllm.recipes.paper import DATASETS, BatchSettings, DataSettings, OptimSettings, PartSettings, stage1, stage2
from dreamllm.recipes.paper.stages import STAGES, find, steps
from dreamllm.training import RunSettings, read_metrics
from tests.training.runs import write_start

PAPER = STAGES["paper"]
ORIGINAL = STAGES["original_code"]


def test_the_papers_figures():
    """Section C.1 and D.2 of the specification: sizes, rates, epochs, documents per GPU, the implied steps."""
    assert {name: stage.learning_rate for name, stage in PAPER.items() if name[-1].isdigit()} == {
        "stage1": 2e-3,
        "stage2": 2e-5,
        "stage3": 4e-5,
    }
    assert PAPER["stage1"].documents_per_epoch == 30_558_000
    assert PAPER["stage2"].documents_per_epoch == 4_000_000
    assert (PAPER["stage3"].documents_per_epoch, PAPER["stage3"].epochs) == (120_000, 3)
    implied = {name: steps(stage.epochs, stage.documents_per_epoch, 1024) for name, stage in PAPER.items()}
    assert (implied["stage2"], implied["stage3"]) == (3907, 352)
    assert {stage.documents_per_gpu for stage in PAPER.values()} == {8}


def test_the_released_configurations_figures():
    """Section C.2."""
    assert ORIGINAL["stage1_creation"].sizes == {
        "laion400m_orig": 20_000_000, "laion_coco": 20_000_000, "blip_laion": 20_000_000,
    }  # fmt: skip
    assert ORIGINAL["stage2"].sizes == {"mmc4_core": 7_000_000, "blip_laion": 10_000_000}
    assert ORIGINAL["stage3"].sizes["llavav1.5_instruct"] == 665_298
    assert ORIGINAL["stage3"].filters == {"min_size": 128}
    assert {stage.documents_per_gpu for stage in ORIGINAL.values()} == {16}
    assert all(stage.epochs == 1 for stage in ORIGINAL.values())


def test_every_stage_has_known_data():
    for variant in STAGES.values():
        for stage in variant.values():
            assert set(stage.sizes) <= set(DATASETS)


def test_the_original_has_no_joint_first_stage():
    with pytest.raises(ValueError, match="has no stage1: the original program trains its halves one by one"):
        find("stage1", "original_code")


def test_a_dry_run_needs_nothing_and_says_everything(capsys):
    main(["train", "stage2", "--dry-run", "--gpus", "64", "--batch.per-pass", "4"])
    text = capsys.readouterr().out
    for words in (
        r"mmc4_core +2,000,000 +50\.0%",
        r"micro-batches +256 +of 4 documents",
        r"passes per GPU +4 +on 64 GPUs",
        r"steps +3,907 +1\.00 epochs",
        r"unet +865\.91 +frozen",
        r"dream_queries +0\.26 +trained",
        r"loss weights +1 : 10",
        r"in all, at the peak +\d",
        r"hours +[\d.]+ +the paper: 10 on 128 A800",
    ):
        assert re.search(words, text), words
    # LLaMA-7B by its dimensions: 32 layers of four square and three wide products and two norms, and the final norm.
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    assert re.search(rf"language_model +{layers / 1e6:,.2f} +trained", text)


def test_a_dry_run_plans_passes_of_tokens(capsys):
    filling = ["--batch.tokens", "4096", "--batch.pictures", "20", "--batch.micro-batches", "128"]
    main(["train", "stage2", "--dry-run", "--gpus", "64", *filling])
    text = capsys.readouterr().out
    per_step = int(re.search(r"([\d,]+) per step on average", text)[1].replace(",", ""))
    assert 0.97 * 128 * 4096 < per_step <= 128 * 4096
    assert "chosen to fill a pass" in text


def test_a_dry_run_counts_and_plans_adapters(capsys):
    main(["train", "stage3", "--dry-run", "--gpus", "8", "--lora.rank", "16"])
    text = capsys.readouterr().out
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    adapters = 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert re.search(rf"language_model +{layers / 1e6:,.2f} +frozen", text)
    assert re.search(rf"adapters +{adapters / 1e6:,.2f} +trained", text)
    # Two moments in float32, over 8 GPUs. Beside the adapters train queries, projectors and the embeddings.
    others = 64 * 4096 + 1025 * 4096 + 4096 * 1024 + 2 * 32008 * 4096
    moments = float(re.search(r"optimiser +([\d.]+)", text)[1])
    assert moments == pytest.approx(8 * (adapters + others) / 8 / 2**30, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "stage2 needs --out, --model, --data.root"),
        (["--dry-run", "--gpus", "96"], "96 GPUs cannot share the 128 micro-batches of a step"),
        (["--dry-run", "--batch.per-pass", "7"], "per_pass 7 does not divide the 1024 documents"),
        (["--dry-run", "--optim.epochs", "2", "--optim.steps", "3"], "both say how long the stage is"),
        (["--dry-run", "--data.folders", '{"mmc5": "/x"}'], "unknown datasets mmc5"),
        (["--dry-run", "--optim.learning-rate", "1"], "learning_rate"),
        (["--dry-run", "--data.root", "nowhere"], "blip_laion: nowhere/blip_laion"),
        (["--dry-run", "--gpu", "b300"], "b300"),
    ],
)
def test_mistakes(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "stage2", *arguments])
    assert message in capsys.readouterr().err


def test_parts_of_ones_own_take_the_place_of_the_root(tmp_path):
    with pytest.raises(ValueError, match=r"data\.parts takes the place of data\.root"):
        DataSettings(root=tmp_path, parts=[PartSettings(tmp_path)])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("paper"))


CONFIG = """
model: {root}/start
out: {out}
data:
  parts:
  - path: {root}/data
    kind: pair_folder
    size: 1K
    options:
      filters:
        min_size: 1
optim:
  lr: 0.001
  steps: 4
batch:
  documents: 4
  per_pass: 2
settings:
  precision: float32
  sharding: none
  workers: 0
  num_threads: 1
  log_every: 1
  device: cpu
samples:
  every: 2
  draw: [a red circle]
"""


def test_a_stage_from_a_configuration_file_with_an_override(start, tmp_path, capsys):
    out = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(CONFIG.format(root=start, out=out))
    main(["train", "stage2", "--config", str(tmp_path / "run.yaml"), "--optim.lr", "0.002"])
    assert f"the model is in {out / 'model'}" in capsys.readouterr().out
    lines = read_metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert max(line["lr"] for line in lines) == 0.002
    assert [(sample.step, sample.prompt) for sample in read_samples(out)] == [
        (2, "draw: a red circle"),
        (4, "draw: a red circle"),
    ]
    stored = json.loads((out / "run.json").read_text())["configuration"]["stages"][0]
    assert stored["kind"] == "stage2"
    assert stored["learning_rate"] == 0.002
    assert stored["micro_batches"] == 2
    assert stored["data"][0]["size"] == "1K"
    trained, before = DreamLLM.from_pretrained(out / "model"), DreamLLM.from_pretrained(start / "start")
    assert not (trained.dream_queries == before.dream_queries).all()
    assert (trained.unet.conv_in.weight == before.unet.conv_in.weight).all()
    main(["train", "stage2", "--config", str(tmp_path / "run.yaml"), "--optim.lr", "0.002"])
    assert "stage2 is complete" in capsys.readouterr().out


def test_a_stage_from_python(start, tmp_path):
    settings = RunSettings(num_threads=1, log_every=1, device="cpu")
    data = DataSettings(parts=[PartSettings(start / "data")])
    model = stage1(
        tmp_path / "run", start / "start", data, OptimSettings(steps=2), BatchSettings(4, 2), seed=3, settings=settings
    )
    assert model == tmp_path / "run" / "model"
    with pytest.raises(ValueError, match="stage2 needs --model"):
        stage2(tmp_path / "other", None, data)


def test_passes_filled_by_tokens(start, tmp_path, capsys):
    """Steps come from the mean number of documents in a full batch; batches are full."""
    settings = RunSettings(num_threads=1, log_every=1, device="cpu")
    data = DataSettings(parts=[PartSettings(start / "data", size=2000)])
    batch = BatchSettings(tokens=2048, micro_batches=2)
    out = tmp_path / "run"
    stage1(out, start / "start", data, OptimSettings(lr=1e-4), batch, seed=3, settings=settings)
    lines = read_metrics(out)
    mean = sum(line["documents"] for line in lines) / len(lines)
    assert 2000 - 0.02 * 2000 <= mean * len(lines) <= 2000 + mean
    assert all(line["tokens"] > 0.97 * 2 * 2048 for line in lines)
    main(["train", "stage2", "--dry-run", "--batch.tokens", "8192", "--gpus", "128"])
    text = capsys.readouterr().out
    assert re.search(r"micro-batches +128 +of 8,192 tokens", text)
    assert "1.00 epochs" in text
    with pytest.raises(ValueError, match=r"batch\.tokens takes the place of batch\.documents"):
        BatchSettings(tokens=100, documents=3)
    with pytest.raises(ValueError, match=r"belong to batch\.tokens"):
        BatchSettings(pictures=3)
