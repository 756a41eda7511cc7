"""Values: what the Kubernetes API and the CNI say, decoded, immutable, standard library only."""
