"""`python -m dreamllm` is the `dreamllm` command."""

from dreamllm.cli import main

if __name__ == "__main__":
    main()
