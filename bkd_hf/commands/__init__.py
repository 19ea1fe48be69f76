"""What `bkd-hf` does, a module with a `main` for each command; `scripts/` calls the same."""
