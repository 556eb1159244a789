"""Matrix products with nf4 weights that are never materialized, and what stands in for them."""
