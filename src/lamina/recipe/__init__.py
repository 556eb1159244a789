"""Recipes: what a run can be told, where it is read from, and the ones that come along."""
