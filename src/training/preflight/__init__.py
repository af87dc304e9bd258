"""Before a run: what it will need (`train.py --plan`), what stands in its way (`--check`), its first two steps (`--dry_run`)."""
