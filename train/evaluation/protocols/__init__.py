"""Evaluation protocols, one per file; each evaluates all networks of a family together."""
