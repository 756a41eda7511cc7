"""Which node has which networks and addresses."""
