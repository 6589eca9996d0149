"""Costs of a run, counted before it starts: multiply-accumulates, memory and communication."""
