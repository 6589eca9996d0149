"""Several processes: process group, rendezvous, gradient all-reduce, batch split, watchdog."""
