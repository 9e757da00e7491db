"""`dreamllm generate`: one prompt from the command line, or many from a file."""
