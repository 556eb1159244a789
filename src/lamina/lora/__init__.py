"""Low-rank adapters (arXiv 2106.09685) on frozen matrices and on stacks of experts."""
