"""Run a trainer with its bf16 matrix products and attention computed in float32: `float32_products.py SCRIPT FLAGS`.

A CPU without bf16 units (AVX2 alone) multiplies bf16 matrices a hundred times slower than float32 ones, and a step of
the full-size model would take hours. Here weights and activations stay bf16; each product converts its operands, and
its result back. So memory is that of bf16 and, for the moment of a product, of one float32 weight (157 MB at full
size); time is not that of bf16.
"""

import runpy
import sys

import torch


PRODUCTS = (
    "mm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


def multiply_in_float32(library, name):
    """Put a kernel before that of a product, which converts bf16 operands to float32 and the results back."""
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keyset, first, *rest, **options):
        if first.dtype != torch.bfloat16:
            return kernel.call_boxed(keyset, first, *rest, **options)
        operands = [x.float() if torch.is_tensor(x) and x.dtype == torch.bfloat16 else x for x in (first, *rest)]
        results = kernel.call_boxed(keyset, *operands, **options)
        if torch.is_tensor(results):
            return results.bfloat16()
        # Of the forward attention, the log-sum-exp beside the output is float32 in any case.
        narrow = range(1) if name.endswith("for_cpu") else range(len(results))
        return tuple(x.bfloat16() if index in narrow else x for index, x in enumerate(results))

    library.impl(name, product, "CPU", with_keyset=True)


if __name__ == "__main__":
    library = torch.library.Library("aten", "IMPL")
    for name in PRODUCTS:
        multiply_in_float32(library, name)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
