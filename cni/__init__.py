"""The CNI plugin: attaches pods to the node."""
