"""How the recorded ratios of an operator changed over the commits that wrote its record."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reporting.records import Record, geometric_mean, parse_record


@dataclass(frozen=True)
class Version:
    """A record as one commit has it."""

    commit: str  # that was measured, where the record says; else the one that has the record
    date: str
    record: Record


@dataclass(frozen=True)
class Trend:
    """Of one operator: geometric mean over the cases that all versions share of 'times as fast as the reference'."""

    operator: str
    reference: str
    cases: int
    points: list[tuple[str, str, float]]  # commit, date, ratio; oldest first


def committed_versions(path: Path) -> list[Version]:
    """Of a record, oldest first; versions that cannot be read as records are left out.

    Raises RuntimeError saying why where there is no history: no git, no repository, or a file it does not know.
    """
    folder = path.resolve().parent
    lines = _git(folder, "log", "--format=%h %cs", "--", path.name).splitlines()
    if not lines:
        raise RuntimeError(f"git has no commit of {path.name}")
    versions = []
    for line in reversed(lines):
        commit, date = line.split()
        try:
            text = _git(folder, "show", f"{commit}:./{path.name}")
            record = parse_record(path.stem, text)
            versions.append(Version(str(record.facts.get("commit") or commit), date, record))
        except (RuntimeError, ValueError):  # the commit deleted it, or it was something else then
            continue
    return versions


def _git(folder: Path, *arguments: str) -> str:
    try:
        found = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError("git is not installed") from error
    if "not a git repository" in found.stderr:
        raise RuntimeError("the record lies in no git repository")
    if found.returncode:
        raise RuntimeError(found.stderr.strip().splitlines()[0] if found.stderr.strip() else "git failed")
    return found.stdout


def trends(versions: list[Version]) -> list[Trend]:
    """Of every operator of the newest version, over the versions measured under its conditions; two at least."""
    if not versions:
        return []
    newest = versions[-1].record
    alike = [v for v in versions if v.record.conditions() == newest.conditions()]
    found = []
    for operator, cases in newest.operators.items():
        reference = cases[0].reference
        having = [(v, _ratios(v.record, operator, reference)) for v in alike] if reference else []
        having = [(version, ratios) for version, ratios in having if ratios]
        shared = set.intersection(*(set(ratios) for _, ratios in having)) if having else set()
        if len(having) < 2 or not shared:
            continue
        points = [(v.commit, v.date, geometric_mean([ratios[key] for key in shared])) for v, ratios in having]
        found.append(Trend(operator, str(reference), len(shared), points))
    return found


def _ratios(record: Record, operator: str, reference: str) -> dict[tuple[str, str, str], float]:
    cases = record.operators.get(operator, [])
    return {case.key: case.times_as_fast_as(reference) for case in cases if reference in case.peers}
