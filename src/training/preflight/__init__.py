"""Before a run: its estimated needs (`train.py --plan`), checks of this machine (`--check`), a trial (`--dry_run`)."""
