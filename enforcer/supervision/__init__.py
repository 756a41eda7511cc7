"""What an agent keeps right beside the ruleset: that it is alone, its secret, and the node's settings."""
