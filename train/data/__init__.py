"""Images to batches: `datasets` reads images, `views` samples and computes views, `loader` makes uint8 batches."""
