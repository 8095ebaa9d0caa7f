"""Images in, uint8 batches out: sources of images, named augmentations, samplers, neighbour files and
loaders."""
