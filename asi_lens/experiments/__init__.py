"""Trainings side by side, each done once and cached."""
