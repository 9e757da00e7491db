"""`dreamllm plan`."""

from __future__ import annotations

from json import dumps
from pathlib import Path

from rich.console import Console

from dreamllm.planning.devices import find_device
from dreamllm.planning.plan import PAPER_GLOBAL_BATCH, Request, make_plan
from dreamllm.planning.records import load_records
from dreamllm.planning.report import as_json, show
from dreamllm.planning.sharding import Sharding
from dreamllm.profiling.workload import Precision
from dreamllm.training import LoraSettings
from dreamllm.training.progress import quiet_transformers
from dreamllm.workloads import model_size
from dreamllm.workloads import stage as find_stage


def plan(
    stage: str,
    gpu: str = "a800",
    gpus: int = 1,
    size: str = "7b",
    micro_batch: int | None = None,
    sharding: Sharding | None = None,
    global_batch: int | None = None,
    precision: Precision = "bfloat16",
    network_gb_per_s: float | None = None,
    gpus_per_node: int | None = None,
    shard_frozen_above_mib: int | None = None,
    tokens_per_batch: int | None = None,
    pictures_per_batch: int | None = None,
    lora_rank: int | None = None,
    records: Path | None = None,
    json: bool = False,
) -> None:
    """Plans a stage on given GPUs: memory, step time, hours, what limits it; searches the best setting.

    Args:
        stage: 1, 2 or 3, or the half stage1_comprehension or stage1_creation.
        gpu: a100, a800, h100 or h200; or cpu, with records.
        gpus: how many of them.
        size: the model: tiny, mini or 7b.
        micro_batch: documents per GPU and pass; searched when neither it nor tokens_per_batch is given.
        sharding: how parameters and their states are divided; searched when not given.
        global_batch: documents per optimiser step; by default the paper's 1024 for 7b, one pass's worth for the others.
        precision: bfloat16 keeps parameters and moments in float32; pure_bfloat16, as the original, does not.
        network_gb_per_s: bandwidth between nodes per GPU and direction; by default 25 GB/s.
        gpus_per_node: GPUs that NVLink connects; by default 8.
        shard_frozen_above_mib: frozen parts that take more are divided, too; as settings.shard_frozen_above_mib.
        tokens_per_batch: tokens per GPU and pass instead, for which documents are chosen; as batch.tokens in training.
        pictures_per_batch: most pictures to create in such a pass; as batch.pictures.
        lora_rank: adapters of this rank train in the place of the decoder's layers, as lora.rank in training.
        records: profile.json that dreamllm profile wrote on such a device; its operators are taken as measured.
        json: print the figures as JSON instead of tables.
    """
    measured = None if records is None else load_records(records)
    device = find_device(gpu, measured, network_gb_per_s, gpus_per_node)
    if global_batch is None:
        per_pass = (micro_batch or model_size(size).documents_per_step) * gpus
        global_batch = -(-PAPER_GLOBAL_BATCH // per_pass) * per_pass if size == "7b" else per_pass
    request = Request(
        find_stage(stage).kind,
        size,
        gpus,
        precision,
        global_batch,
        micro_batch,
        sharding,
        shard_frozen_above_mib,
        tokens_per_batch,
        pictures_per_batch,
        lora=None if lora_rank is None else LoraSettings(lora_rank),
    )
    console = Console()
    with quiet_transformers(), Console(stderr=True).status("planning") as status:
        made = make_plan(request, device, measured, lambda text: status.update(text))
    if json:
        print(dumps(as_json(made), indent=2))
    else:
        show(made, console)
