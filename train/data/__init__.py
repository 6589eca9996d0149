"""Images to batches: `datasets` reads images, `views` draws and computes their views, `loader` makes uint8 batches."""
