"""What a pretrained family is worth."""
