"""The training and decoding engine: layer-major over blocks, expert-major inside them."""
