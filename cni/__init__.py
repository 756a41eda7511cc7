"""The pod network of a node (CNI specification 0.3.1 to 1.1.0).

A runtime runs the executable of ``shim``; it hands environment, standard input and the pod's network namespace to
``plugin``, which reserves addresses (``store``), makes the link (``links``), waits until the enforcer holds the pod's
policy, and only then raises the link (``operations``). ``node`` is the bridge, and the routes and tunnels to the pods
of other nodes.

``plugin.operations.Enforcer`` is all that this knows of the enforcer's engine; ``enforcer.agent`` puts both together.
"""
