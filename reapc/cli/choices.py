"""What several commands let one choose from."""

CRITERIA = ["reap", "ean", "ean_sum", "frequency", "weighted_sum"]
MEASURED = "auto"  # the criterion is chosen by what it costs
