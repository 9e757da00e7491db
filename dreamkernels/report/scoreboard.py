"""A model of one multiprocessor that predicts in which order launch parameters will run. UNVALIDATED on a GPU.

The compiler has written every dependency into the instructions: a stall count for results of fixed latency, and for the
others a scoreboard that one instruction sets and later ones wait for. So the main loop can be replayed without knowing
its registers: W identical warps of one of the four sub-partitions, one instruction issued per cycle, the last warp
preferred while it can go on (greedy, then oldest), each pipe busy for its issue interval.

Not modelled: caches and memory (what a loop loads ahead counts as arrived), bank conflicts, what is outside the main
loop, branches inside it. Latencies are estimates. Use it to compare parameters of one kernel, and trust an order only
once it has been compared with times measured on a GPU.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dreamkernels.devices import load_device

SUB_PARTITIONS = 4
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_ENCODING = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_DENSE_MULTIPLY_ADDS_PER_CYCLE = {"sm_80": 256, "sm_90": 1024}  # 16-bit, per sub-partition
_ITERATIONS = 12


@dataclass(frozen=True)
class Instruction:
    """One instruction; `control` is the word that holds its stall count and scoreboards."""

    address: int
    opcode: str
    operands: str
    control: int

    @property
    def multiply_adds(self) -> int:
        """Of one warp, in a matrix product: HMMA.16816 is 16 x 8 x 16, HGMMA of 64 x N x K is shared by four warps."""
        if shape := re.match(r"HGMMA\D*(\d+)\s*x(\d+)x(\d+)", f"{self.opcode} {self.operands}"):
            m, n, k = map(int, shape.groups())
            return m * n * k // 4
        return {"HMMA.16816": 2048, "HMMA.1688": 1024, "HMMA.1684": 512}.get(".".join(self.opcode.split(".")[:2]), 0)


@dataclass(frozen=True)
class Prediction:
    """Of the main loop of a kernel, where all multiprocessors run nothing else."""

    cycles_per_iteration: float  # of one warp among its neighbours
    tensor_share: float  # of the cycles in which the tensor cores are busy
    tflops: float


def read_instructions(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions in `nvdisasm -c -hex` and the addresses of its labels."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    lines = listing.splitlines()
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            waiting.append(label.group(1))
        elif found := _LINE.match(line):
            address = int(found.group(1), 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            upper = _ENCODING.search(lines[number + 1]) if number + 1 < len(lines) else None
            control = int(upper.group(1), 16) >> 41 if upper else 0
            instructions.append(Instruction(address, found.group(2), found.group(3), control))
    return instructions, labels


def main_loop(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """The innermost loop with most tensor-core work that is not masked: of equals the one with fewest instructions."""
    loops = []
    for instruction in instructions:
        target = _TARGET.search(instruction.operands) if instruction.opcode.startswith("BRA") else None
        begin = labels.get(target.group(1), instruction.address) if target else instruction.address
        if begin < instruction.address:
            loops.append((begin, instruction.address))
    bodies = [
        [i for i in instructions if begin <= i.address <= end]
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]
    bodies = [body for body in bodies if any(i.multiply_adds for i in body)]
    return max(bodies, key=lambda body: (sum(i.multiply_adds for i in body), -len(body)), default=[])


# Opcode prefix -> pipe, cycles that it occupies, latency beyond them where a scoreboard waits for it.
_PIPES: tuple[tuple[tuple[str, ...], str, float, int], ...] = (
    (("MUFU",), "special", 8, 22),
    (("F2F", "I2F", "F2I"), "special", 2, 14),
    (("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2"), "float", 2, 0),
    (("LDSM",), "memory", 8, 29),
    (("LDGSTS",), "memory", 16, 0),
    (("LDS", "STS"), "memory", 8, 26),
    (("LDG", "LD.E"), "memory", 8, 450),
    (("STG", "ST.E"), "memory", 16, 0),
    (("LDL", "STL"), "memory", 4, 35),
    (("SHFL", "REDUX"), "memory", 4, 24),
    (("FMNMX", "FSEL", "FSETP", "IMAD", "IADD", "LEA", "LOP", "SHF", "ISETP", "PRMT", "MOV", "SEL"), "integer", 2, 0),
    (("U", "R2UR", "S2UR"), "uniform", 2, 0),
)


def _pipe(instruction: Instruction, architecture: str) -> tuple[str, float, int]:
    if products := instruction.multiply_adds:
        peak = _DENSE_MULTIPLY_ADDS_PER_CYCLE[architecture]
        if instruction.opcode.startswith("HMMA") and architecture == "sm_90":
            peak //= 2  # the older instruction reaches half of the newer one's rate
        return "tensor", products / peak, 60 if instruction.opcode.startswith("HGMMA") else 0
    for prefixes, pipe, interval, latency in _PIPES:
        if instruction.opcode.startswith(prefixes):
            if pipe == "float" and architecture == "sm_90":
                interval = 1
            return pipe, interval, latency
    return "other", 1, 12


def simulate(body: Sequence[Instruction], architecture: str, warps: int) -> tuple[float, float]:
    """Cycles per iteration and warp, and the share of them in which the tensor cores are busy.

    `warps` is the number of warps on one sub-partition.
    """
    pipes = [_pipe(instruction, architecture) for instruction in body]
    stalls = [max(1, instruction.control & 0xF) for instruction in body]
    sets = [(instruction.control >> 5 & 7, instruction.control >> 8 & 7) for instruction in body]
    waits = [[bar for bar in range(6) if instruction.control >> 11 >> bar & 1] for instruction in body]
    ready, position, done = [0.0] * warps, [0] * warps, [0] * warps
    scoreboards = [[0.0] * 6 for _ in range(warps)]
    free: dict[str, float] = defaultdict(float)
    now, end, last, tensor_busy = 0.0, 0.0, 0, 0.0

    def earliest(warp: int) -> float:
        at = position[warp]
        return max([ready[warp], free[pipes[at][0]], *(scoreboards[warp][bar] for bar in waits[at])])

    while any(count < _ITERATIONS for count in done):
        times = {warp: max(now, earliest(warp)) for warp in range(warps) if done[warp] < _ITERATIONS}
        soonest = min(times.values())
        able = [warp for warp, time in times.items() if time == soonest]
        warp = last if last in able else min(able, key=lambda w: (w - last) % warps)
        at = position[warp]
        pipe, interval, latency = pipes[at]
        free[pipe] = soonest + interval
        tensor_busy += interval if pipe == "tensor" else 0
        written, read = sets[at]
        if written != 7:
            scoreboards[warp][written] = soonest + interval + (latency or 20)
        if read != 7:
            scoreboards[warp][read] = max(scoreboards[warp][read], soonest + interval + 6)
        now, ready[warp], last = soonest + 1, soonest + stalls[at], warp
        end = max(end, soonest + max(interval, stalls[at]))
        position[warp] = (at + 1) % len(body)
        done[warp] += position[warp] == 0
    return end / (_ITERATIONS * warps), tensor_busy / end


def predict(listing: str, architecture: str, warps: int, blocks_per_sm: int) -> Prediction | None:
    """None where a kernel has no loop with tensor-core instructions, or does not fit."""
    body = main_loop(*read_instructions(listing))
    if not body or not blocks_per_sm:
        return None
    resident = max(1, blocks_per_sm * warps // SUB_PARTITIONS)
    cycles, tensor_share = simulate(body, architecture, resident)
    limits = load_device(architecture).limits
    per_second = SUB_PARTITIONS * limits["multiprocessors"] * limits["clock_ghz"] * 1e9
    return Prediction(cycles, tensor_share, 2 * sum(i.multiply_adds for i in body) / cycles * per_second / 1e12)
