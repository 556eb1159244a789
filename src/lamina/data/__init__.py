"""Data files to tokens with a loss mask, and to the batches of a run."""
