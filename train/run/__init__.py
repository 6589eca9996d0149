"""Shared by the commands that train: run directory, checkpoints, log, progress, interruption."""
