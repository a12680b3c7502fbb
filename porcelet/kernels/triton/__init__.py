"""Bodies for GPUs, in Triton. Importing this package registers them on their ops and does not import Triton, which is
first needed when a tensor on a GPU arrives; `pip install 'porcelet[gpu]'` brings it.

They serve bfloat16 and float16; a call of another precision is the definition's.
"""

from porcelet.kernels.triton import choices, loss, paged, pointwise, products  # noqa: F401
