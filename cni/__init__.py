"""The CNI plugin: attaches pods to the node (CNI specification 0.3.1 to 1.1.0).

A runtime runs the executable of ``cni/shim``; it hands environment, standard input and the pod's network namespace to
the server in the agent, which reserves addresses (``ipam``), makes the link (``links``), waits until the enforcer holds
the pod's policy, and only then raises the link (``operations``).

How the agent composes it, in this order::

    store = Store(run_dir / "state.db")              # cni.ipam
    node = Node(bridge_netfilter="disable")          # cni.node; or "leave"
    operations = Operations(store=store, node=node, enforcer=enforcer)       # cni.operations
    attachments = operations.start(pod_cidrs)        # bridge, sysctls, routes; rolls back what a killed agent left
    ...                                              # hand the attachments to the enforcer, let it commit
    server = CniServer(run_dir / "cni.sock", operations)                     # cni.server
    server.start()                                   # serves in threads of its own
    ...
    operations.set_pod_cidrs(pod_cidrs)              # at any time, from any thread; () means "not known yet"
    operations.attachments()                         # tuple[Attachment, ...]: those that are ready
    ...
    server.stop()                                    # lets operations in flight end; links and rules stay
    store.close()

``enforcer`` is anything with ``attach(attachment)``, ``detach(key)`` and ``ready()``: see ``cni.operations.Enforcer``.
``attach`` may raise ``cni.operations.EnforcerUnavailable``; they are called from many threads at once.
What is changed of the node's settings is logged. ``cni.node.remove_all()`` is for ``drawbridge uninstall``.
"""
