"""The long-tail metrics, as a folder for `evaluate.load` that can be pushed as a Space."""
