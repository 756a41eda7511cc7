"""Resolved policies in, ruleset objects out: pure. The words of the table are chosen here."""
