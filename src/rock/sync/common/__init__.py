# GENERATED from src/rock/sdk/common/__init__.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""ROCK's path of what is shared."""
