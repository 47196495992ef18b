"""A rehearsal: a tiny random model with a real one's structure goes through every pass of its recipe."""
