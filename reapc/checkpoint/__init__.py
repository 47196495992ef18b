"""Checkpoints in and out, a tensor at a time."""
