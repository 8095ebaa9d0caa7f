"""From images to uint8 batches: sources of images, named augmentations, samplers, neighbour files and loaders."""
