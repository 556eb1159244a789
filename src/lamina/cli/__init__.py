"""The command line: what is typed, what is shown, and nothing else. The work is done elsewhere."""
