"""Mistakes on purpose, and which tests see them: see `tests.mutations.__main__`."""
