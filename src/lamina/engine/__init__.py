"""The training and decoding engine: layer-major over blocks, expert-major inside them."""

from lamina.engine.heap import limit_kernel_cache

limit_kernel_cache()
