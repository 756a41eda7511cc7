"""The enforcer: NetworkPolicy objects in, one nftables table out.

A change goes down the packages in this order: ``kubernetes`` or ``manifests`` decode it, ``reconcile`` keeps it,
``policy`` says what it means, ``translate`` words that as ``ruleset`` objects, and ``kernel`` commits them.
"""
