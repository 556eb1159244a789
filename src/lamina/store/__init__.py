"""Weights on disk: converting a checkpoint into a store, and streaming it."""
