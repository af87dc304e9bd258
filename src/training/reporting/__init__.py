"""What a run tells: reports of its steps, the places they go to, and its course read back from its files."""
