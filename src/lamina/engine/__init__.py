"""The training and decoding engine: layer-major over blocks, expert-major inside them."""

import os

from lamina.plan.work import KERNELS

# oneDNN compiles a kernel for each shape and would keep a thousand of them, half a megabyte each.
# Read before the process's first matrix product; what the user has set stands.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
