"""Plans: properties that any right plan has, hand-computed figures, and every error message."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models.workloads import stage_documents, training_stage
from benchmarks.original_pattern import OriginalPattern, Trainer, pad_batch
from dreamllm.cli import main
from dreamllm.model import DreamLLM
from dreamllm.planning import (
    DoesNotFitError,
    Plan,
    Records,
    Request,
    find_device,
    gpus,
    load_records,
    make_plan,
    peak_flops,
)
from dreamllm.planning.batches import Filling, Load, draw_batches, load_of, pack
from dreamllm.planning.devices import GIB, LINK_EFFICIENCY
from dreamllm.planning.estimate import StepTime, layout_of, operators_time, simulate
from dreamllm.planning.paper import original_work
from dreamllm.planning.plan import Planner
from dreamllm.planning.records import RecordedOperator, records_of
from dreamllm.planning.report import show
from dreamllm.planning.sharding import SHARDINGS, Layout, state_bytes, traffic
from dreamllm.planning.waiting import pass_seconds, slowest_gpu_seconds
from dreamllm.profiling import profile_workload
from dreamllm.profiling.recorder import Operator
from dreamllm.training.operations import StepOperations
from dreamllm.training.step import prepare_model
from dreamllm.workloads import make_model, make_processor, model_config, stage_config

A800 = find_device("a800", None)


def request(**changes) -> Request:
    values = {
        "stage": "stage2",
        "size": "tiny",
        "gpus": 16,
        "precision": "bfloat16",
        "global_batch": 256,
        "micro_batch": None,
        "sharding": None,
    }
    return Request(**{**values, **changes})


def evaluate(sharding: str, filling: int | Filling, device=A800, **changes) -> Plan:
    filling = Filling(filling) if isinstance(filling, int) else filling
    return Planner(request(**changes), device, None).evaluate(sharding, filling)


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_memory_grows_with_the_micro_batch(sharding):
    sizes = [evaluate(sharding, n).memory_bytes for n in (1, 4, 8)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 2 * sizes[0] > 0


@pytest.mark.parametrize("gpus", [2, 8, 64])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "pure_bfloat16"])
def test_sharding_divides_the_states(gpus, precision):
    layout = Layout(trained=6_000_000, frozen=1_000_000, unit=200_000)
    sharded = state_bytes(layout, "full", precision, gpus, 8)
    whole = state_bytes(layout, "full", precision, 1, 8)
    for kind in ("parameters", "gradients", "optimiser"):
        assert sharded[kind] == whole[kind] / gpus
    per_parameter = {"float32": 16, "bfloat16": 16, "pure_bfloat16": 8}[precision]
    total = sum(whole[kind] for kind in ("parameters", "gradients", "optimiser"))
    assert total == per_parameter * layout.trained
    assert sharded["frozen parts"] == whole["frozen parts"]


def test_hybriding_divides_by_the_node():
    layout = Layout(6_000_000, 0, 200_000)
    assert state_bytes(layout, "hybrid", "bfloat16", 64, 8) == state_bytes(layout, "full", "bfloat16", 8, 8)


def test_grad_op_keeps_all_weights_and_full_a_few():
    layout = Layout(6_000_000, 0, 200_000)
    kept = {s: state_bytes(layout, s, "bfloat16", 64, 8)["gathered weights"] for s in ("grad_op", "full")}
    assert kept == {"grad_op": 2 * 6_000_000, "full": 2 * 2 * 200_000}


def test_seven_billion_parameters_need_the_known_memory():
    """Of the 7b at stage II: 6.747 billion train, 1.253 billion are frozen; 16 bytes each, and 2."""
    layout = layout_of("stage2", "7b", "pure_bfloat16")
    hidden, intermediate, vocabulary = 4096, 11008, 32008
    layer = 4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden
    trained = 32 * layer + hidden + 2 * vocabulary * hidden + 64 * hidden + 1025 * hidden + hidden * 1024
    assert layout.trained == trained
    assert layout.unit == layer
    assert round(layout.frozen / 1e9, 2) == 1.25
    held = state_bytes(layout, "full", "bfloat16", 128, 8)
    assert held["optimiser"] == pytest.approx(8 * 6.747e9 / 128, rel=1e-3)


def test_large_frozen_parts_are_divided_when_a_threshold_says_so():
    """In stage I the 6.476 billion parameters of the decoder's layers are frozen, and the UNet's 866 million."""
    whole = layout_of("stage1", "7b", "pure_bfloat16")
    layout = layout_of("stage1", "7b", "pure_bfloat16", shard_frozen_above_mib=1024)
    assert (layout.trained, layout.frozen, whole.spread) == (whole.trained, whole.frozen, 0)
    assert layout.spread_layers == 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert round(layout.spread_parts / 1e6) == 866
    assert layout.gathered == layout.spread_parts  # CLIP and VAE are smaller than the threshold
    held = [state_bytes(each, "full", "bfloat16", 8, 8)["frozen parts"] for each in (whole, layout)]
    assert held[0] - held[1] == 2 * layout.spread * 7 / 8
    sent = [traffic(each, "full", "bfloat16", 8, A800, 1) for each in (whole, layout)]
    share = 2 * 7 / 8 / (200e9 * 0.8)
    assert sent[1].forward - sent[0].forward == pytest.approx(layout.spread * share)
    assert sent[1].backward - sent[0].backward == pytest.approx(layout.spread_layers * share)


def test_a_step_of_the_7b_costs_the_published_operations():
    """Three forward passes' worth in the layers and the head, frozen parts as published.

    LLaMA-7B: 12.95 GFLOP per token forward, 0.26 for the head; UNet 0.803 TFLOP per picture, VAE encoder 1.12, CLIP
    0.155 (23 of 24 layers; here all run).
    """
    documents = draw_batches("stage2", "7b", Filling(1)).typical
    load = load_of(documents)
    recording = simulate("stage2", "7b", "pure_bfloat16", documents)

    def flops(part: str, phase: str, kind: str | None = None) -> float:
        own = [o for o in recording.operators if (o.part, o.phase) == (part, phase) and kind in (None, o.kind)]
        return sum(o.flops * o.calls for o in own)

    # The last layer's output projection and MLP run where a loss reads; all but down projections run twice.
    square, wide = 4096**2, 4096 * 11008
    unread = load.tokens - load.targets - 64 * load.pictures
    forward = 12.95e9 * load.tokens - 2 * (square + 3 * wide) * unread
    again = 12.95e9 * load.tokens - 2 * 32 * wide * load.tokens - 2 * (square + 2 * wide) * unread
    assert flops("LLM", "forward", "matrix product") == pytest.approx(forward, rel=1e-3)
    assert flops("LLM", "backward", "matrix product") == pytest.approx(2 * forward + again, rel=1e-3)
    assert flops("loss", "forward") == pytest.approx(3 * 0.262e9 * load.targets, rel=1e-2)
    assert flops("UNet", "forward") == pytest.approx(0.803e12 * load.pictures, rel=1e-2)
    assert flops("VAE", "forward") == pytest.approx(1.12e12 * load.pictures, rel=2e-2)
    assert flops("CLIP", "forward") == pytest.approx(0.155e12 * load.images * 24 / 23, rel=2e-2)


@pytest.mark.parametrize(
    ("stage", "size"), [("stage1_creation", "7b"), ("stage1", "tiny"), ("stage1_comprehension", "tiny")]
)
def test_the_operations_that_a_run_counts_are_those_recorded(stage, size):
    """Where nothing is computed twice. A run does not count attention's scores again in its backward pass."""
    documents = draw_batches(stage, size, Filling(2)).typical
    config = stage_config(stage, size)
    with torch.device("meta"):
        model = DreamLLM(model_config(size))
    prepare_model(model, config)
    counted = StepOperations(model, config.weights[0]).of(pack(documents, size))
    recorded = simulate(stage, size, "pure_bfloat16", documents).flops
    assert 0.97 * recorded < counted <= recorded


def test_the_peak_of_a_gpu_is_taken_by_its_name(monkeypatch):
    names = {
        "NVIDIA A800-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": None,
        "Tesla T4": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found = peak_flops(torch.device("cuda"), "bfloat16")
        assert found == (peak and pytest.approx(peak, rel=1e-3))
    assert peak_flops(torch.device("cpu"), "float32") > 1e8


def test_the_largest_batch_decides_the_memory():
    drawn = draw_batches("stage2", "tiny", Filling(4))
    assert load_of(drawn.largest(1.0, 0.0)).tokens == max(load_of(group).tokens for group in drawn.groups)
    plan = evaluate("full", 4)
    assert plan.largest.tokens > plan.load.tokens


def test_passes_of_tokens_are_full():
    """Each holds at most the tokens and pictures; together nearly all of them: what training's packing is held to."""
    drawn = draw_batches("stage2", "7b", Filling(tokens=8192, pictures=24))
    loads = [load_of(group) for group in drawn.groups]
    assert max(load.tokens for load in loads) <= 8192
    assert max(load.pictures for load in loads) <= 24
    assert drawn.mean.tokens == pytest.approx(sum(load.tokens for load in loads) / len(loads))
    assert drawn.mean.tokens > 0.97 * 8192
    whole = draw_batches("stage2", "7b", Filling(tokens=8192)).mean
    assert whole.tokens / whole.documents == pytest.approx(
        draw_batches("stage2", "7b", Filling(8)).mean.tokens / 8, 0.03
    )


def test_documents_with_too_many_pictures_are_left_out_as_in_training():
    groups = draw_batches("stage2", "7b", Filling(tokens=4096, pictures=1)).groups
    assert max(len(document.targets) for group in groups for document in group) == 1
    with pytest.raises(ValueError, match="document of stage1_creation creates more than 0 pictures"):
        draw_batches("stage1_creation", "7b", Filling(tokens=4096, pictures=0))


def test_drawn_batches_hold_what_the_stage_holds():
    drawn = draw_batches("stage2", "7b", Filling(8))
    assert 600 * 8 < drawn.mean.tokens < 1000 * 8
    assert load_of(drawn.typical).tokens == pytest.approx(drawn.mean.tokens, rel=0.1)
    assert drawn.mean.documents == 8


# -- time ------------------------------------------------------------------------------------------------------------


def test_time_follows_the_limits():
    product = Operator("mm", "matrix product", "mm(...)", "LLM", "forward", flops=10**12, bytes=10**6, calls=3)
    copy = Operator("add", "element-wise and other", "add(...)", "LLM", "forward", flops=0, bytes=10**9, calls=2)
    time = operators_time([product, copy], A800, None)
    assert time.by_limit["compute"] == pytest.approx(3 / (312 * 0.75))
    assert time.by_limit["memory"] == pytest.approx(2 / (2039 * 0.85))
    assert time.by_part["LLM"] == time.by_phase["forward"] == pytest.approx(time.seconds)


def test_a_faster_gpu_is_faster():
    hours = [evaluate("full", 8, find_device(gpu, None)).hours for gpu in ("a100", "h100")]
    assert hours[0] > hours[1]


def test_many_small_operators_are_bound_by_the_host():
    plan = evaluate("full", 1)
    assert max(plan.limits, key=plan.limits.get) == "launch"
    assert plan.time.seconds >= 500 * A800.launch_seconds


def test_rates_and_hours_agree():
    plan = evaluate("grad_op", 4)
    assert plan.accumulation == 4
    assert plan.steps == 4_000_000 // 256
    assert plan.documents_per_second * plan.step_seconds == pytest.approx(256)
    assert plan.hours * 3600 == pytest.approx(plan.total_documents / plan.documents_per_second)
    assert sum(plan.limits.values()) == pytest.approx(plan.step_seconds)


def of_parts(**seconds) -> StepTime:
    time = StepTime()
    for part, value in seconds.items():
        time.by_part[part] += value
        time.by_limit["compute"] += value
    return time


def load(tokens: float, pictures: float) -> Load:
    return Load(documents=1, tokens=tokens, targets=tokens, images=0, pictures=pictures)


def test_a_pass_takes_as_long_as_what_it_holds():
    time = of_parts(LLM=4.0, UNet=2.0, joints=1.0)
    assert pass_seconds(time, load(100, 10), load(100, 10)) == pytest.approx(7.0)
    assert pass_seconds(time, load(100, 10), load(50, 20)) == pytest.approx(2.0 + 4.0 + 0.5)
    time.by_limit["launch"] += 3.0  # the host is the limit: a smaller batch is no faster
    assert pass_seconds(time, load(100, 10), load(10, 1)) == pytest.approx(10.0)
    assert pass_seconds(time, load(100, 10), load(200, 20)) == pytest.approx(14.0)


def test_the_slowest_of_many_gpus_has_the_longest_documents():
    """Loads of 1 and 3 with a mean of 2: among many GPUs one has 3; over passes that meet only at the end, less."""
    time, loads = of_parts(LLM=2.0), [load(1, 0), load(3, 0)]

    def waiting(gpus, accumulation=1, every_pass=True):
        return slowest_gpu_seconds(time, load(2, 0), loads, gpus, accumulation, every_pass)

    assert waiting(1) == 0.0
    assert waiting(2) == pytest.approx(0.5, abs=0.25)  # 3 with probability 3/4
    assert waiting(64) == pytest.approx(1.0)
    assert waiting(64, 4) == pytest.approx(4.0)
    assert 1.0 < waiting(8, 4, every_pass=False) < waiting(8, 4)
    assert slowest_gpu_seconds(time, load(2, 0), [load(2, 0)], 64, 4, True) == pytest.approx(0.0)


def test_waiting_is_part_of_the_step():
    plan = evaluate("full", 8)
    assert plan.waiting_seconds > 0
    assert plan.limits["waiting"] == plan.waiting_seconds
    alone = evaluate("none", 8, gpus=1)
    assert alone.waiting_seconds == 0


def test_gpus_wait_less_where_tokens_fill_their_passes():
    """As many tokens as 8 documents have on average, so that a step has the same documents but for rounding."""
    tokens = round(draw_batches("stage2", "tiny", Filling(8)).mean.tokens)
    counted = evaluate("full", 8)
    filled = evaluate("full", Filling(tokens=tokens))
    assert filled.accumulation == counted.accumulation == 2
    assert filled.documents_per_step == pytest.approx(256, rel=0.1)
    assert filled.waiting_seconds < 0.5 * counted.waiting_seconds
    assert filled.steps == pytest.approx(4_000_000 / filled.documents_per_step, abs=1)
    assert evaluate("full", Filling(tokens=tokens), tokens_per_batch=tokens, passes=3).accumulation == 3


def test_the_originals_work_is_what_its_steps_compute():
    """Counted in a step of the original's pattern itself; without attention, of which it computes the padding here."""
    processor = make_processor("tiny")
    documents = [processor.encode(document) for document in stage_documents("stage2", "tiny", 8)]
    trainer = Trainer(OriginalPattern(make_model("tiny")), training_stage("stage2", 8))
    batch = pad_batch(documents, processor.layout, processor)
    with FlopCounterMode(display=False) as counter:
        trainer.step(batch, torch.Generator().manual_seed(0))
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    recording = simulate("stage2", "tiny", "float32", documents)
    attention = sum(op.flops * op.calls for op in recording.operators if op.kind == "attention")
    work = original_work("stage2", "tiny", "float32", recording, load_of(documents), batch.input_ids.numel())
    # A tenth: the last product of a checkpointed layer need not be computed again, and the pattern's CLIP has one more
    # layer than the features need.
    assert work.original * len(documents) - attention == pytest.approx(counted, rel=0.1)


def test_traffic_of_hand_computed_sizes():
    layout = Layout(trained=10**9, frozen=0, unit=10**8)
    inside = traffic(layout, "full", "bfloat16", 8, A800, 1)
    link = 200e9 * LINK_EFFICIENCY  # A800: 400 GB/s both directions together
    assert inside.forward == pytest.approx(2e9 * 7 / 8 / link)
    assert inside.backward == pytest.approx((2e9 + 4e9) * 7 / 8 / link)
    once = traffic(layout, "grad_op", "bfloat16", 8, A800, 1)
    assert once.backward == pytest.approx(4e9 * 7 / 8 / link)
    alone = traffic(layout, "none", "bfloat16", 8, A800, accumulation=4)
    assert alone.backward == pytest.approx(2 * 4e9 * 7 / 8 / link / 4)
    assert traffic(layout, "none", "bfloat16", 1, A800, 1).backward == 0


def test_a_slow_network_shows():
    slow = find_device("a800", None, network_gb_per_s=0.5)
    layout = Layout(10**9, 0, 10**8)
    assert traffic(layout, "full", "bfloat16", 64, slow, 1).forward == pytest.approx(
        2e9 * 63 / 64 / (8 * 0.5e9 * LINK_EFFICIENCY)
    )
    plan = evaluate("full", 8, find_device("a800", None, network_gb_per_s=0.0001))
    assert next(iter(plan.limits)) == "communication"
    # Between nodes, hybrid sharding sends a gradient piece only.
    hybrid, full = (traffic(layout, s, "bfloat16", 64, slow, 1) for s in ("hybrid", "full"))
    assert hybrid.forward + hybrid.backward < full.forward + full.backward


# -- records ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile():
    return profile_workload("stage2", "tiny", steps=1)


def test_records_give_back_what_was_measured(profile):
    records = records_of(profile)
    time = operators_time(profile.recording.operators, find_device("cpu", records), records)
    measured = sum(operator.seconds for operator in profile.recording.operators)
    assert time.by_limit["measured"] == pytest.approx(measured)
    assert time.seconds == pytest.approx(measured + profile.unattributed_seconds)
    assert time.measured_share == pytest.approx(1)


def test_a_record_stands_for_sizes_near_it():
    records = Records("x", [RecordedOperator("mm", "mm(float32[8, 4], float32[4, 4])", 256, 192, 1e-3)], 0.0)
    near = Operator("mm", "matrix product", "mm(float32[16, 4], float32[4, 4])", "LLM", "forward", 512, 320)
    assert records.seconds(near) == pytest.approx(2e-3)
    assert records.seconds(replace(near, signature="mm(bfloat16[16, 4], bfloat16[4, 4])")) is None
    assert records.seconds(replace(near, flops=512_000, bytes=320_000)) is None
    assert records.seconds(replace(near, name="bmm")) is None


def test_records_are_read_from_a_profile(tmp_path, profile):
    main(["profile", "--size", "tiny", "--steps", "1", "--out", str(tmp_path / "p")])
    records = load_records(tmp_path / "p" / "profile.json")
    assert {op.signature for op in records.operators} >= {
        op.signature for op in profile.recording.operators if op.kind == "matrix product"
    }
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json is not a profile.json"):
        load_records(tmp_path / "other.json")


# -- search and messages -----------------------------------------------------------------------------------------------


def test_the_search_finds_the_fastest_setting_that_fits():
    best = make_plan(request(global_batch=32), A800)
    assert best.fits
    fillings = {candidate.filling for candidate in best.considered}
    assert {filling.documents for filling in fillings} == {None, 1, 2}
    assert len(best.considered) == len(SHARDINGS) * len(fillings)
    exhaustive = [evaluate(c.sharding, c.filling, global_batch=32) for c in best.considered]
    fastest = max((p for p in exhaustive if p.fits), key=lambda p: p.documents_per_second)
    assert best.documents_per_second == pytest.approx(fastest.documents_per_second, rel=0.05)


def test_a_given_setting_is_kept():
    plan = make_plan(request(micro_batch=2, sharding="hybrid"), A800)
    assert (plan.sharding, plan.filling, plan.accumulation) == ("hybrid", Filling(2), 8)


def test_what_does_not_fit_says_by_how_much_and_what_would():
    enough = evaluate("full", 1).memory_bytes
    small = replace(A800, memory_gib=A800.reserved_gib + 1.1 * enough / GIB)
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(request(micro_batch=8, sharding="full"), small)
    message = str(caught.value)
    assert "stage2 of the tiny model does not fit on 16 x NVIDIA A800" in message
    assert "with micro_batch 8 needs" in message
    over = evaluate("full", 8).memory_bytes - 1.1 * enough
    assert f"{over / 2**20:.1f} MiB more than the {1.1 * enough / 2**20:.1f} MiB that can be used" in message
    assert "What would fit: micro_batch 1 with sharding full" in message
    with pytest.raises(
        DoesNotFitError, match=r"with tokens_per_batch 2048 needs .* What would fit: tokens_per_batch \d+"
    ):
        make_plan(request(tokens_per_batch=2048, sharding="full"), small)
    with pytest.raises(DoesNotFitError, match=r"What would fit: \d+ GPUs with sharding \w+ and micro_batch 1"):
        make_plan(request(gpus=1, global_batch=1), small)
    nothing = replace(A800, memory_gib=3.0 + 1e-6)
    with pytest.raises(DoesNotFitError, match="No number of these GPUs fits it"):
        make_plan(request(), nothing)


def test_the_paper_is_beside_the_plan():
    text = io.StringIO()
    show(make_plan(request(micro_batch=4, sharding="full"), A800), Console(file=text, width=140))
    shown = text.getvalue()
    for hours, gpu_hours in (("6.0", "768"), ("10.0", "1,280"), ("1.5", "192")):
        line = next(line for line in shown.splitlines() if gpu_hours in line.split() and hours in line.split())
        assert line.startswith("stage")
    assert "nothing was measured on this device" in shown
    assert "the paper's" not in shown.lower().replace("\n", " ")  # its hours say nothing about another size
    assert "efficiency.matrix product: assumption; with it" in shown


def test_the_command_prints_json(capsys):
    main(
        [
            "plan",
            "--gpu",
            "h100",
            "--gpus",
            "8",
            "--stage",
            "2",
            "--size",
            "tiny",
            "--micro-batch",
            "2",
            "--sharding",
            "full",
            "--json",
        ]
    )
    values = json.loads(capsys.readouterr().out)
    assert values["gpu"] == "h100"
    assert values["micro_batch"] == 2
    assert values["paper_hours"] == 10
    assert values["gpu_hours"] == pytest.approx(8 * values["hours"])
    assert values["memory_bytes_total"] == pytest.approx(sum(values["memory_bytes"].values()))


def test_the_command_plans_passes_of_tokens(capsys):
    filling = ["--tokens-per-batch", "512", "--pictures-per-batch", "24"]
    main(["plan", "--gpus", "8", "--stage", "2", "--size", "tiny", *filling, "--sharding", "full", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert (values["micro_batch"], values["tokens_per_batch"], values["pictures_per_batch"]) == (None, 512, 24)
    assert values["global_batch"] == pytest.approx(values["documents_per_second"] * values["step_seconds"])
    assert 0.9 * 512 < values["tokens_per_pass"] <= 512
    main(["plan", "--gpus", "8", "--stage", "2", "--size", "tiny", *filling, "--sharding", "full"])
    shown = capsys.readouterr().out
    assert "tokens per batch     512  per GPU and pass (--batch.tokens)" in shown
    assert "pictures per batch    24  to create, at most (--batch.pictures)" in shown


def test_a_plan_for_this_processor(tmp_path, capsys):
    main(["profile", "--size", "tiny", "--steps", "1", "--out", str(tmp_path / "p")])
    records = str(tmp_path / "p" / "profile.json")
    arguments = ["--gpu", "cpu", "--records", records, "--stage", "2", "--size", "tiny", "--precision", "float32"]
    capsys.readouterr()
    main(["plan", *arguments, "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["sharding"] == "none"
    assert values["measured_share_of_time"] > 0.9


def test_every_figure_of_a_gpu_has_a_source():
    for device in gpus().values():
        figures = {"memory_gib", "bf16_dense_tflops", "memory_gb_per_s", "nvlink_gb_per_s"}
        assert set(device.sources) == figures | {f"efficiency.{kind}" for kind in device.efficiency}
        assert all(device.sources.values())
        assert all(0 < share < 1 for share in device.efficiency.values())
    assert gpus()["a800"].nvlink_gb_per_s == 400
    assert 0 < gpus()["h200"].usable_bytes < 141 * GIB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "a8000"], "unknown GPU 'a8000'. Did you mean 'a800'? Known GPUs:\n  a100: NVIDIA A100"),
        (["--stage", "7"], "unknown stage '7'"),
        (["--size", "70b"], "unknown size '70b'. Did you mean '7b'"),
        (["--gpus", "0"], "gpus must be at least 1, not 0"),
        (
            ["--micro-batch", "3", "--gpus", "4", "--global-batch", "64"],
            "micro_batch 3 does not divide the 16 documents",
        ),
        (["--gpus", "3", "--global-batch", "64"], "64 documents cannot be divided among 3 GPUs; 66 can"),
        (["--gpu", "cpu"], "give --records profile.json"),
        (["--precision", "float32"], "float32 is planned for the cpu only"),
        (["--network-gb-per-s", "0"], "network_gb_per_s must be positive, not 0"),
        (["--sharding", "zero"], "sharding"),
        (["--tokens-per-batch", "100"], "tokens_per_batch 100 must hold a document of 128 tokens"),
        (["--tokens-per-batch", "512", "--micro-batch", "2"], "give either micro_batch (documents per pass) or tokens"),
        (["--pictures-per-batch", "2"], "pictures_per_batch belongs to tokens_per_batch, which is not given"),
        (["--records", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_end_with_one_clear_message(capsys, arguments, message):
    defaults = {"--gpu": "a800", "--stage": "2", "--size": "tiny"}
    given = [word for name, value in defaults.items() if name not in arguments for word in (name, value)]
    with pytest.raises(SystemExit) as ended:
        main(["plan", *given, *arguments])
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text
