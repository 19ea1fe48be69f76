"""The commands of `bkd-hf`: a module with a `main` for each, also called by `scripts/`."""
