"""What a run tells about itself while it runs and afterwards."""
