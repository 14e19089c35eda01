"""Runs the notebooks and shows their results. No other subpackage uses the notebooks."""
