"""The loop: the one owner of all mutable state, from changes to transactions."""
