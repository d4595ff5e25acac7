"""Which layer becomes what."""
