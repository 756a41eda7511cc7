"""The demonstration: a shop in network namespaces of its own, the real agent, the real CNI executable, real packets."""
