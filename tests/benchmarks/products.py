"""Run a trainer with other bf16 matrix products and attention, on a CPU: `products.py {float32,none} SCRIPT FLAGS`.

A CPU without bf16 units (AVX2 alone) multiplies bf16 matrices a hundred times slower than one that has them, and a
step of the full-size model would take many minutes, nearly all of them in the products. There are two ways around it:

float32  Each product converts its operands to float32, and its result back. Weights and activations stay bf16, so
         memory is that of bf16 and, for the moment of a product, of one float32 weight (157 MB at full size).
none     Products cost nothing and give zeros. What is left is all that a trainer adds to them: norms, activations,
         casts, the LoRA's and the optimizer's upkeep, reading data. The time of a step is this and the products' own.
"""

import runpy
import sys

import torch


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def multiply_in_float32(keyset, kernel, first, *rest, **options):
    """The product of bf16 operands by the float32 kernel."""
    operands = [x.float() if torch.is_tensor(x) and x.dtype == torch.bfloat16 else x for x in (first, *rest)]
    results = kernel.call_boxed(keyset, *operands, **options)
    if torch.is_tensor(results):
        return results.bfloat16()
    # Of the forward attention, the log-sum-exp beside the output is float32 in any case.
    narrow = range(1) if len(results) == 2 else range(len(results))
    return tuple(x.bfloat16() if index in narrow else x for index, x in enumerate(results))


def zero_matrix(keyset, kernel, *operands, out=None, **options):
    """A product of zeros: the last two operands are the matrices."""
    *_, a, b = operands
    return a.new_zeros(*a.shape[:-1], b.shape[-1]) if out is None else out.zero_()


def zero_attention(keyset, kernel, query, key, value, *rest, **options):
    """Zeros for the output [B, heads, tokens, channels] (in the layout of the kernel) and for its log-sum-exp."""
    batch, heads, tokens, channels = query.shape
    output = query.new_zeros(batch, tokens, heads, channels).transpose(1, 2)
    return output, query.new_zeros(batch, tokens, heads, dtype=torch.float32).transpose(1, 2)


def zero_attention_gradients(keyset, kernel, grad, query, key, value, *rest, **options):
    """Zeros for the gradients of query, key and value."""
    return tuple(x.new_zeros(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value))


REPLACEMENTS = {
    "float32": dict.fromkeys(["mm", ATTENTION, f"{ATTENTION}_backward"], multiply_in_float32),
    "none": dict.fromkeys(["mm", "mm.out", "addmm", "addmm.out", "bmm", "bmm.out"], zero_matrix)
    | {ATTENTION: zero_attention, f"{ATTENTION}_backward": zero_attention_gradients},
}


def replace(library, name, replacement):
    """Put a replacement before the CPU's kernel of a product, for bf16 operands."""
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keyset, first, *rest, **options):
        if first.dtype == torch.bfloat16:
            return replacement(keyset, kernel, first, *rest, **options)
        return kernel.call_boxed(keyset, first, *rest, **options)

    library.impl(name, product, "CPU", with_keyset=True)


if __name__ == "__main__":
    library = torch.library.Library("aten", "IMPL")
    for name, replacement in REPLACEMENTS[sys.argv[1]].items():
        replace(library, name, replacement)
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
