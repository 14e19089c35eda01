"""Runs the notebooks and shows what they left; the only room that knows them."""
