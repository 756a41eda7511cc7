"""The node's own side of the pod network: the bridge and its sysctls, and the ways to the pods of other nodes."""
