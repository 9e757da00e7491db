"""Whether the compiled libraries load here: `python -m benchmarks.gpu_libraries cuda|cpu`; exit 1 where one is missing.

They may have been built here or carried here: both are linked against torch's stable interface only.
"""

from __future__ import annotations

import sys

from dreamkernels import libraries

NEEDED = {"cpu": ("_cpu",), "cuda": ("_cpu", "_cuda")}


def main() -> int:
    if sys.argv[1:2] not in (["cpu"], ["cuda"]):
        print("usage: python -m benchmarks.gpu_libraries cpu|cuda", file=sys.stderr)
        return 2
    for part in libraries.LOADED.values():
        print(f"{part.name}: {'loaded' if part.loaded else f'MISSING, {part.error}; {part.cost}'}")
    missing = [name for name in NEEDED[sys.argv[1]] if not libraries.LOADED[name].loaded]
    if missing:
        print(f"missing: {', '.join(missing)}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
