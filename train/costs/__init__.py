"""Costs by count: multiply-accumulates, memory, communication, and the dry run that shows them."""
