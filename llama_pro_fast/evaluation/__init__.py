"""Measuring: held-out text, what it is held against, and an export read back."""
