"""The pretraining run: the algorithm, its step, its state and the run around it."""
