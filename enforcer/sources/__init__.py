"""Where objects come from: a directory of manifests. Bodies become values of the model here, and nowhere else."""
