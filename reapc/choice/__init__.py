"""The measured choice of the pruning criterion: candidates as masks on the streamed original, nothing written."""
