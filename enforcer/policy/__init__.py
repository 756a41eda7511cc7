"""What NetworkPolicy objects mean for the addresses of this node: pure, and ignorant of nftables.

``verdict`` is the executable reading of the API. ``resolve`` says from scratch what the kernel must hold.
``PolicyIndex`` keeps the same answer up to date, at the cost of what a change touches.
"""
