"""What `python -m benchmarks run --record` wrote, read back. Fields that older records lack are None or empty."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results"
REFERENCES = ("eager", "original pattern")  # whichever a case has
# What must agree before the times of two records say something about the code.
CONDITIONS = ("device", "processor", "instruction set", "threads", "settings")


@dataclass(frozen=True)
class Measured:
    """One contender of one case."""

    minimum_us: float
    median_us: float
    peak_extra_bytes: int | None = None
    seconds_per_sample: float | None = None  # from the median, where a case has documents, pictures, ...

    @property
    def least_seconds_per_sample(self) -> float | None:
        """From the minimum, as all other times."""
        if self.seconds_per_sample is None:
            return None
        return self.seconds_per_sample * self.minimum_us / self.median_us

    @property
    def spread(self) -> float:
        """Natural logarithm of median over minimum: how far a usual round lies above the best one."""
        return math.log(max(self.median_us / self.minimum_us, 1.0))


@dataclass(frozen=True)
class RecordedCase:
    operator: str
    label: str
    caches: str | None
    contenders: dict[str, Measured]  # the first one is ours
    bytes_moved: int | None = None
    flops: int | None = None
    copy_minimum_us: float | None = None
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.operator, self.label, self.caches or "caches not recorded"

    @property
    def name(self) -> str:
        return f"{self.operator} {self.label}" + (f", {self.caches} caches" if self.caches else "")

    @property
    def ours(self) -> str:
        return next(iter(self.contenders))

    @property
    def peers(self) -> list[str]:
        return list(self.contenders)[1:]

    @property
    def reference(self) -> str | None:
        """The peer that ratios are taken against: one of REFERENCES, or the first one of a case without them."""
        return next((name for name in (*REFERENCES, *self.peers) if name in self.peers), None)

    def times_as_fast_as(self, peer: str) -> float:
        return self.contenders[peer].minimum_us / self.contenders[self.ours].minimum_us

    def share_of_copy_bandwidth(self, contender: str) -> float | None:
        if not self.copy_minimum_us:
            return None
        return self.copy_minimum_us / self.contenders[contender].minimum_us

    def gflops(self, contender: str) -> float | None:
        """Declared operations per time: a contender that computes more than the case needs gets no credit for it."""
        return self.flops / self.contenders[contender].minimum_us / 1e3 if self.flops else None

    @property
    def flops_per_byte(self) -> float | None:
        return self.flops / self.bytes_moved if self.flops and self.bytes_moved else None

    @property
    def copy_gb_per_second(self) -> float | None:
        if not self.copy_minimum_us or not self.bytes_moved:
            return None
        return self.bytes_moved / self.copy_minimum_us / 1e3


@dataclass(frozen=True)
class Record:
    name: str
    cases: list[RecordedCase]
    facts: dict[str, Any]  # everything else of the file, as it stands there

    @property
    def operators(self) -> dict[str, list[RecordedCase]]:
        found: dict[str, list[RecordedCase]] = {}
        for case in self.cases:
            found.setdefault(case.operator, []).append(case)
        return found

    @property
    def extrapolations(self) -> list[dict[str, Any]]:
        """As benchmarks/extrapolation.py writes them. Never among the cases, which are measured."""
        return self.facts.get("extrapolations") or []

    @property
    def boundary_us(self) -> dict[str, dict[str, float]]:
        return {name: rows for name, rows in (self.facts.get("boundary_us") or {}).items() if rows}

    @property
    def matmul_gflops(self) -> dict[str, float]:
        """Limits of arithmetic by dtype, where the run measured them."""
        return (self.facts.get("limits") or {}).get("matmul_gflops") or {}

    @property
    def allocator(self) -> str | None:
        settings = self.facts.get("settings")
        if settings is None:
            return None
        kept = settings.get("MALLOC_MMAP_MAX_") == "0"
        return "keeps freed memory in the process" if kept else "glibc's defaults"

    def conditions(self) -> dict[str, Any]:
        """By the names of CONDITIONS; None where the record does not say."""
        devices = self.facts.get("devices") or {}
        return {
            "device": self.facts.get("device"),
            "processor": devices.get("cpu"),
            "instruction set": devices.get("cpu_isa"),
            "threads": self.facts.get("threads"),
            "settings": self.facts.get("settings"),
        }

    def environment(self) -> list[tuple[str, str]]:
        """What the run was measured on, for people; what the record does not say is named so."""
        devices, versions = self.facts.get("devices") or {}, self.facts.get("versions")
        caches = sorted({case.caches for case in self.cases if case.caches})
        facts = [
            ("date", self.facts.get("date")),
            ("commit", self.facts.get("commit")),
            ("measured on", self.facts.get("device")),
            ("size", self.facts.get("size")),
            ("processor", devices.get("cpu")),
            ("instruction set", devices.get("cpu_isa")),
            ("GPUs", ", ".join(map(str, devices["cuda"])) or "none" if "cuda" in devices else None),
            *([("driver", self.facts["driver"])] if self.facts.get("driver") else []),
            ("threads", self.facts.get("threads")),
            ("caches", " and ".join(caches) or None),
            ("allocator", self.allocator),
            ("OMP_WAIT_POLICY", (self.facts.get("settings") or {}).get("OMP_WAIT_POLICY")),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else None),
        ]
        if self.facts.get("torch_compile") is False:
            facts.append(("torch.compile", "left out of this run"))
        return [(name, "not recorded" if value is None else str(value)) for name, value in facts]

    def problems(self) -> list[str]:
        """Sentences on what was wrong, and on what could not run here."""
        wrong = [f"WRONG: {what}: {error}" for what, error in (self.facts.get("errors") or {}).items()]
        return wrong + [f"Not run: {name}: {reason}" for name, reason in (self.facts.get("not_here") or {}).items()]


def parse_record(name: str, text: str) -> Record:
    """Raises ValueError naming the record and what is wrong with it."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if isinstance(data, list):  # benchmarks.models writes its cases alone
        data = {"cases": data}
    if not isinstance(data, dict) or not isinstance(data.get("cases"), list):
        raise ValueError(f"{name} has no list of cases; such a record is written by: python -m benchmarks run --record")
    cases = [_parse_case(name, number, case) for number, case in enumerate(data["cases"])]
    return Record(name, cases, {key: value for key, value in data.items() if key != "cases"})


def _parse_case(name: str, number: int, case: dict[str, Any]) -> RecordedCase:
    try:
        contenders = {
            contender: Measured(
                float(values["minimum_us"]),
                float(values["median_us"]),
                values.get("peak_extra_bytes"),
                values.get("seconds_per_sample"),
            )
            for contender, values in case["contenders"].items()
        }
        operator, label = case["operator"], case["case"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}, case {number}: operator, case, contenders with minimum_us and median_us are needed; "
                         f"missing or unreadable: {error}") from error  # fmt: skip
    if not contenders or min(measured.minimum_us for measured in contenders.values()) <= 0:
        raise ValueError(f"{name}, case {number} ({operator} {label}): at least one contender, all times above zero")
    return RecordedCase(
        operator=operator,
        label=label,
        caches=case.get("caches"),
        contenders=contenders,
        bytes_moved=case.get("bytes_moved"),
        flops=case.get("flops"),
        copy_minimum_us=case.get("copy_minimum_us"),
        failures=case.get("failures") or {},
    )


def find_record(name: str | Path) -> Path:
    """A path, or the name of a record in benchmarks/results. Raises FileNotFoundError saying which there are."""
    path = Path(name)
    if path.is_file():
        return path
    recorded = RESULTS / f"{name}.json"
    if recorded.is_file():
        return recorded
    known = ", ".join(sorted(path.stem for path in RESULTS.glob("*.json")))
    raise FileNotFoundError(f"{name} is neither a file nor a record in benchmarks/results ({known})")


def load_record(name: str | Path) -> Record:
    path = find_record(name)
    return parse_record(path.stem, path.read_text(encoding="utf-8"))


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
