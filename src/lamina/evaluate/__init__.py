"""What a tuned model does: the text it writes, and its loss over data."""
