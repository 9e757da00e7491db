"""The recorder's figures against torch's own counters, the tracker's attribution, and what the command writes."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dreamkernels import attention, linear_cross_entropy
from dreamllm.cli import main
from dreamllm.profiling import Repetitions, as_fake, prepare, profile_workload
from dreamllm.profiling.operators import FlopCounter, kind_of
from dreamllm.profiling.parts import PARTS, PartTracker
from dreamllm.profiling.recorder import Operator, Recorder
from dreamllm.profiling.report import show
from dreamllm.profiling.workload import PreparedStep, Recording
from dreamllm.training import LoraSettings, stage_batches
from dreamllm.workloads import make_model, make_processor, stage_config


def ready(
    workload: str, size: str = "tiny", precision: str = "float32", documents: int = 5, fake: bool = False, lora=None
):
    config = replace(stage_config(workload, size, documents_per_step=documents), lora=lora)
    batch = stage_batches(config, make_processor(size))[0].batch.to("cpu")
    return prepare(size, config, precision, fake=fake), batch, batch.cu_seqlens.diff().tolist()


class Nothing(TorchDispatchMode):
    """Under any such mode frozen layers of a CPU run torch's own products, as they do for a recorder."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def record(step: PreparedStep, batch, lengths, timed: bool = False):
    return step.record(batch, lengths, timed)


# -- floating-point operations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vision_model", "vae"])
def test_operations_are_those_that_torch_counts(part):
    model = make_model("tiny")
    called = {
        "unet": lambda: model.unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 9]), torch.randn(2, 4, 16)),
        "vision_model": lambda: model.vision_model(torch.randn(2, 3, 16, 16)),
        "vae": lambda: model.vae.encode(torch.randn(2, 3, 16, 16)),
    }[part]
    # torch cannot count dreamkernels' attention: both run torch's, by its mathematical definition.
    model.use_fused_operators(False)
    model.vision_model.set_attn_implementation("sdpa")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as expected:
            called()
        with PartTracker(model) as tracker, Recorder(tracker, FlopCounter([])) as recorder:
            called()
    found = sum(operator.flops * operator.calls for operator in recorder.operators)
    assert found == expected.get_total_flops() > 0


def counted(call, lengths=()) -> int:
    model = make_model("tiny")
    with PartTracker(model) as tracker, Recorder(tracker, FlopCounter(lengths)) as recorder:
        call()
    return sum(operator.flops * operator.calls for operator in recorder.operators)


def test_attention_counts_its_products():
    q, k, v = (torch.randn(2, 7, 3, 16, requires_grad=True) for _ in range(3))
    q4, k4, v4 = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as torchs:
        F.scaled_dot_product_attention(q4, k4, v4)
    assert counted(lambda: attention(q, k, v)) == torchs.get_total_flops()
    # Backward: the scores again, and a gradient for each of the four factors of two products.
    assert counted(lambda: attention(q, k, v).sum().backward()) == torchs.get_total_flops() * 7 // 2


def test_packed_causal_attention_counts_the_pairs_of_each_sequence():
    lengths = [5, 1, 9]
    x = torch.randn(sum(lengths), 2, 16)
    ends = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    found = counted(
        lambda: attention(x, x, x, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=9, max_seqlen_k=9, causal=True),
        lengths,
    )
    pairs = sum(i + 1 for n in lengths for i in range(n))
    assert found == 2 * 2 * pairs * 2 * 16


def test_linear_cross_entropy_counts_three_products():
    hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets = torch.arange(6)
    assert counted(lambda: linear_cross_entropy(hidden, weight, targets)) == 3 * 2 * 6 * 16 * 40
    with torch.no_grad():
        assert counted(lambda: linear_cross_entropy(hidden, weight, targets)) == 2 * 6 * 16 * 40


def test_a_whole_step_costs_three_forward_passes_of_what_trains():
    step, batch, lengths = ready("stage2")
    step.model.use_less_memory("none")
    operators = record(step, batch, lengths).operators
    products = [op for op in operators if op.part == "LLM" and op.kind == "matrix product"]
    flops = {p: sum(op.flops * op.calls for op in products if op.phase == p) for p in ("forward", "backward")}
    assert flops["backward"] == 2 * flops["forward"]
    layers = sum(p.numel() for p in step.model.decoder.layers.parameters() if p.ndim == 2)
    last = step.model.decoder.layers[-1]
    spared = sum(p.numel() for p in (last.self_attn.o_proj.weight, *last.mlp.parameters()))
    unread = batch.num_tokens - batch.loss_positions.numel() - batch.dream_positions.numel()
    assert unread > 0
    assert flops["forward"] == 2 * (layers * batch.num_tokens - spared * unread)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("addmm", "matrix product"),
        ("attention_backward", "attention"),
        ("_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("convolution_backward", "convolution"),
        ("linear_cross_entropy", "cross entropy"),
        ("add_rms_norm", "RMSNorm"),
        ("native_group_norm", "group norm"),
        ("_fused_adamw_", "AdamW"),
        ("_to_copy", "cast and copy"),
        ("add", "element-wise and other"),
        ("linalg_vector_norm", "element-wise and other"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


# -- attribution -----------------------------------------------------------------------------------------------------


def test_every_part_appears_in_its_phases():
    step, batch, lengths = ready("stage2")
    found = {(op.part, op.phase) for op in record(step, batch, lengths).operators}
    both = {(part, phase) for part in ("LLM", "UNet", "loss", "joints") for phase in ("forward", "backward")}
    assert both | {("CLIP", "forward"), ("VAE", "forward"), ("optimiser", "update")} <= found
    assert {part for part, _ in found} <= set(PARTS)
    assert not found & {("CLIP", "backward"), ("VAE", "backward")}  # frozen, and nothing before them trains


def test_backward_operators_belong_to_the_part_whose_forward_made_them():
    step, batch, lengths = ready("stage2")
    operators = record(step, batch, lengths).operators
    parts = {name: {op.part for op in operators if op.name == name} for name in {op.name for op in operators}}
    assert parts["convolution_backward"] == {"UNet"}
    assert parts["swiglu_backward"] == parts["rms_norm_backward"] == {"LLM"}
    assert parts["linear_cross_entropy_scale"] == parts["diffusion_loss_backward"] == {"loss"}
    assert parts["splice_embeddings_backward"] == {"joints"}
    assert parts["_fused_adamw_"] == parts["linalg_vector_norm"] == {"optimiser"}


def test_a_stage_without_pictures_to_create_has_no_unet():
    step, batch, lengths = ready("stage1_comprehension")
    assert not {op.part for op in record(step, batch, lengths).operators} & {"UNet", "VAE"}


def test_recording_changes_nothing():
    step, batch, lengths = ready("stage2")
    other, *_ = ready("stage2")
    before = dict(vars(step.model))
    record(step, batch, lengths)
    with Nothing():
        other.run([batch])
    assert vars(step.model).keys() == before.keys()
    assert not step.model.unet._forward_hooks
    for (name, a), b in zip(step.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name


# -- memory ----------------------------------------------------------------------------------------------------------


def allocator_peak(step: PreparedStep, batch) -> int:
    """The most that the allocator holds during a step beyond what it held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    step.optimizer.zero_grad(set_to_none=True)
    with Nothing(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step.run([batch])
    held = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("workload", "precision", "documents", "lora"),
    [("stage2", "bfloat16", 2, None), ("stage1", "float32", 3, None), ("stage2", "bfloat16", 2, LoraSettings(8))],
)
def test_memory_of_tensors_without_contents_is_the_measured_one(workload, precision, documents, lora):
    """The memory model against the allocator, for the mini model: activations and temporaries within a tenth."""
    step, batch, lengths = ready(workload, "mini", precision, documents, lora=lora)
    fake, *_ = ready(workload, "mini", precision, documents, fake=True, lora=lora)
    predicted = record(fake, as_fake(batch, fake), lengths)
    step.run([batch])
    assert predicted.peak_bytes == pytest.approx(allocator_peak(step, batch), rel=0.1)
    trained = [p for p in step.model.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in trained)
    assert predicted.held_bytes["parameters"] == size
    assert predicted.peak_of["gradients"] == size
    moments = sum(t.nbytes for state in step.optimizer.state.values() for t in state.values() if t.ndim)
    assert predicted.held_bytes["optimiser"] == pytest.approx(moments, rel=1e-3)


@pytest.mark.parametrize("lora", [None, LoraSettings(4)])
def test_fake_and_real_steps_run_the_same_operators(lora):
    step, batch, lengths = ready("stage2", lora=lora)
    fake, *_ = ready("stage2", fake=True, lora=lora)
    real = record(step, batch, lengths)
    made = record(fake, as_fake(batch, fake), lengths)
    assert made.flops == real.flops

    def products(recording):
        return {(op.signature, op.part, op.phase): op.calls for op in recording.operators if op.flops}

    assert products(made) == products(real)


# -- the profile and its command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return profile_workload("stage2", "tiny", steps=1, out=tmp_path_factory.mktemp("profile"))


def test_times_are_those_of_the_step(measured):
    assert measured.step_seconds > 0
    assert measured.data_seconds > 0
    assert all(operator.seconds > 0 for operator in measured.recording.operators)
    assert measured.synchronisations == []


def test_disturbances_count_neither_for_operators_nor_between_them():
    def recording(*seconds: float) -> Recording:
        operators = [
            Operator(name, "matrix product", name, "LLM", "forward", 1, 1, 1, s)
            for name, s in zip("ab", seconds, strict=True)
        ]
        return Recording(operators, {}, 0, {}, {}, {})

    found = Repetitions()
    for seconds, recorded in ((11.0, recording(1.0, 9.0)), (7.5, recording(5.0, 2.0)), (9.0, recording(2.0, 3.0))):
        found.add(seconds, recorded)
    assert [operator.seconds for operator in found.recording.operators] == [1.0, 2.0]
    assert found.step_seconds == 7.5
    assert found.unattributed_seconds == 1.0  # of 1.0, 0.5 and 4.0


def test_the_trace_has_a_range_for_each_part(measured):
    events = json.loads(measured.trace.read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"LLM forward", "LLM backward", "UNet forward", "UNet backward", "CLIP forward", "VAE forward"} <= names
    assert {"loss forward", "optimiser update", "aten::_fused_adamw_", "dreamkernels::attention"} <= names


def test_tables_name_what_was_asked_for(measured):
    text = io.StringIO()
    show(measured, Console(file=text, width=120))
    lines = text.getvalue().splitlines()
    for row in ("data", *PARTS, "communication", "matrix product", "attention", "RMSNorm", "SwiGLU", "peak"):
        assert any(line.startswith(row) for line in lines), row
    assert "host synchronisations inside the step: 0" in text.getvalue()


def test_the_command_writes_a_trace_and_figures(tmp_path, capsys):
    main(["profile", "--workload", "stage1", "--size", "tiny", "--steps", "1", "--out", str(tmp_path / "p"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert printed == stored
    assert stored["host_synchronisations"] == []
    assert (tmp_path / "p" / "trace.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "stage4"], "unknown stage 'stage4'. Did you mean"),
        (["--size", "maxi"], "unknown size 'maxi'. Known sizes:"),
        (["--size", "tiny", "--steps", "0"], "steps must be at least 1, not 0"),
        (["--size", "tiny", "--documents-per-step", "0"], "documents_per_step must be at least 1"),
    ],
)
def test_mistakes_end_with_one_clear_message(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["profile", "--out", str(tmp_path / "p"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
