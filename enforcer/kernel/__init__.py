"""The kernel's side: transactions, generations and counters of our two nftables tables."""
