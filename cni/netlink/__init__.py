"""Netlink messages, packed."""
