"""The family against each network alone."""
