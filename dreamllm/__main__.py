"""The `dreamllm` command: says what is missing where only the operators were installed, else runs `dreamllm.cli`."""

from __future__ import annotations

import sys

try:
    from dreamllm.cli import main
except ModuleNotFoundError as error:
    if error.name is not None and error.name.split(".")[0] in ("dreamllm", "dreamkernels"):
        raise
    sys.exit(
        f"dreamllm: the package {error.name} is not installed; "
        "install what dreamllm needs with: pip install --no-build-isolation '.[dreamllm]'"
    )

if __name__ == "__main__":
    main()
