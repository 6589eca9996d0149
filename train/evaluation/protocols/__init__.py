"""How a pretrained family is evaluated: one protocol a file, each giving all its networks in one go."""
