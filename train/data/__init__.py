"""Images to batches: `sets` finds them, `augment` draws the views, `loader` makes uint8 batches and normalises them."""
