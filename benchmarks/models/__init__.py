"""Whole models: one module per kind of step."""
