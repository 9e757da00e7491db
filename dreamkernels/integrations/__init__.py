"""Make existing models use the operators, keeping their parameters: `transformers` (LLaMA and its kin)."""
