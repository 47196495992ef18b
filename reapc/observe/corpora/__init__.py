"""Calibration corpora: sources of samples, the chat template, and packing to exact token budgets."""
