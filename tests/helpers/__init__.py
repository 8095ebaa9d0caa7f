"""What several tests use: the scripts in processes, images, files that a run leaves, oracles."""
