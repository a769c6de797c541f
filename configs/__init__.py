"""Experiments as data: one file per result, each with its command."""
