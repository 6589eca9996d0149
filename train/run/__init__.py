"""What every command that trains shares: its directory, checkpoints, progress, interruption."""
