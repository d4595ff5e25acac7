"""What a run leaves: records, console, JSON."""
