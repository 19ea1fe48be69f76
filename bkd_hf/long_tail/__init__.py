"""The long-tail metrics, as a folder that `evaluate.load` takes and that can be pushed as a Space."""
