"""`dreamllm evaluate`."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from dreamllm.evaluation.benchmarks import (
    BENCHMARKS,
    Benchmark,
    DigitsBenchmark,
    LanguageBenchmark,
    Protocol,
    find_benchmark,
)
from dreamllm.evaluation.digits_run import run_digits
from dreamllm.evaluation.records import Shard
from dreamllm.evaluation.run import REPORT_FILE, Results, RunOptions, run_benchmark
from dreamllm.training.progress import plain_table, quiet_transformers

LIST_WIDTH = 160
"""Of the table where no terminal tells its own width."""

WIDE, LONG = 130, 48
"""From `WIDE` on every part of the table has a column of its own; elsewhere alternatives longer than `LONG` stand below
each other."""

NO_FILES = "none: they come with scikit-learn"


def evaluate(
    benchmark: str = "",
    model: Path | None = None,
    data: Path | None = None,
    out: Path | None = None,
    protocol: Protocol | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    processes: int = 1,
    shard: str = "0/1",
    judge: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    list: bool = False,
) -> None:
    """Evaluates a model on a benchmark. Rerun the same command to resume.

    Args:
        benchmark: name of the benchmark; see --list.
        model: a model folder.
        data: folder with the benchmark's files; see --list.
        out: folder of the run; default: evaluation/BENCHMARK.
        protocol: original (the default) asks and draws as the original program does; plain asks in one line, greedily,
            in the model's own template, draws as the model's configuration recommends, and leaves language tasks to
            lm-eval's own definitions.
        limit: evaluate on the first samples only.
        batch_size: samples that are answered or drawn together.
        processes: processes that share the samples out; with device cuda each has a GPU of its own.
        shard: this part of the samples only, as INDEX/COUNT, where processes are started by other means.
        judge: MODULE:FUNCTION that grades an answer of MM-Vet, called with question, accepted answers and answer.
        device: cpu, cuda, cuda:1, ...
        dtype: of the weights: float32, bfloat16 or float16.
        list: show the benchmarks, what they need and what the paper reports.
    """
    if list:
        show_list(Console())
        return
    if not benchmark:
        raise ValueError("name a benchmark; --list shows them")
    chosen = find_benchmark(benchmark)
    if isinstance(chosen, DigitsBenchmark | LanguageBenchmark):
        own: dict[str, object] = {"judge": judge}
        own |= {"protocol": protocol, "data": data, "limit": limit} if isinstance(chosen, DigitsBenchmark) else {}
        surplus = [f"--{name}" for name, value in own.items() if value is not None]
        surplus += ["--processes"] if processes != 1 else []
        surplus += ["--shard"] if shard != "0/1" else []
        if surplus:
            raise ValueError(
                f"{chosen.title} is evaluated in its own way, by one process; leave {', '.join(surplus)} away"
            )
    if isinstance(chosen, DigitsBenchmark):
        data = Path()
    if model is None or data is None:
        missing = " and ".join(name for name, given in (("--model", model), ("--data", data)) if given is None)
        files = f"; the data folder holds: {', '.join(chosen.files)}" if chosen.files else ""
        raise ValueError(f"{chosen.title} needs {missing}{files}")
    if not Path(model).is_dir():
        raise FileNotFoundError(f"model folder {model} does not exist")
    folder = out or Path("evaluation") / chosen.name
    options = RunOptions(
        model, data, folder, protocol or "original", limit, batch_size, device, dtype, Shard.parse(shard), judge
    )  # fmt: skip
    with quiet_transformers():
        results = _run(chosen, options, processes)
    show_results(results, options, Console())


def _run(benchmark: Benchmark, options: RunOptions, processes: int) -> Results | None:
    if isinstance(benchmark, DigitsBenchmark):
        return run_digits(options)
    if isinstance(benchmark, LanguageBenchmark):
        # Not imported with this file: lm-eval takes seconds, and every command would wait for it.
        if find_spec("lm_eval") is None:
            raise ModuleNotFoundError(
                f"{benchmark.title} is run by lm-eval, part of the extra [eval]; install it with: pip install lm-eval"
            )
        return import_module("dreamllm.evaluation.harness.lm_eval_run").run_language(benchmark, options)
    return run_benchmark(benchmark, options, processes)


def show_results(results: Results | None, options: RunOptions, console: Console) -> None:
    """The figures, and where everything is."""
    if results is None:
        console.print(f"shard {options.shard.index} is complete; the results follow when all {options.shard.count} are")
        return
    width = max(len(figure["name"]) for figure in results["figures"])
    for figure in results["figures"]:
        shown = f"not run: {figure['reason']}" if figure["value"] is None else f"{figure['value']:.2f}"
        console.print(f"{figure['name']:{width}}  {shown}", markup=False, highlight=False, soft_wrap=True)
    paper = f"; the paper reports {results['paper']}" if results["paper"] else ""
    console.print(f"{results['samples']} samples of {results['title']}, {results['split']}{paper}", markup=False)
    console.print(f"report: {options.out / REPORT_FILE}", markup=False, soft_wrap=True)


def show_list(console: Console) -> None:
    """The benchmarks as a table; on a narrow terminal the files stand below metric and split."""
    if not console.is_terminal:
        console = Console(width=LIST_WIDTH, file=console.file)
    console.print(_wide_list() if console.width >= WIDE else _narrow_list(), markup=False)


def _wide_list() -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("benchmark", "metric", "split", "files in the data folder", "paper"):
        table.add_column(
            name, justify="right" if name == "paper" else "left", no_wrap=name == "benchmark", overflow="fold"
        )
    for benchmark in BENCHMARKS.values():
        files = "\n".join(benchmark.files) or NO_FILES
        table.add_row(benchmark.name, benchmark.metric, benchmark.split, files, benchmark.paper or "-")
    return table


def _narrow_list() -> Table:
    table = plain_table(("benchmark", "left"), ("metric, split, files in the data folder", "fold"), ("paper", "right"))
    for benchmark in BENCHMARKS.values():
        names = benchmark.files or (NO_FILES,)
        files = (name if len(name) < LONG else name.replace(" or ", " or\n    ") for name in names)
        about = [f"{benchmark.metric}, {benchmark.split}", *(f"  {file}" for file in files)]
        table.add_row(benchmark.name, "\n".join(about), (benchmark.paper or "-").replace(" (", "\n("))
    return table
