"""nftables objects, their text, and what has changed among them: pure, and ignorant of policies."""
