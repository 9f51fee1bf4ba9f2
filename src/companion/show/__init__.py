"""Looking: figures, stacks of images, the viewer, the gallery."""
