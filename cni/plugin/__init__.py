"""The CNI plugin: the specification's operations, what they do to a pod, and how a runtime comes to call them."""
