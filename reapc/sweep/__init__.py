"""KL against bytes: a grid of builds of one model, measured on one panel."""
