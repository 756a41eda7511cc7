"""What an operator sees of a running agent: logs, metrics, health."""
