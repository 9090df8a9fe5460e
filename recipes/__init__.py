"""Whole experiments, and the `esr` command."""
