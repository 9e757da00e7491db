"""Speed of the operators beside PyTorch on this machine: `python -m benchmarks run [operator ...]`."""
