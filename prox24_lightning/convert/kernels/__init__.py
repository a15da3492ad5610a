"""Products with a packed 2:4 weight on a GPU, one folder a kernel.

:mod:`.registry` chooses among them by name, and :mod:`.reference` is what they compute, in plain torch.

=================  ================================================================================
folder             kernel
=================  ================================================================================
few_tokens         our CUDA kernel on ``mma.sp`` for 1 to 256 tokens, Ampere and newer
warpgroup          our CUDA kernel on ``wgmma.sp`` for 1 to 512 tokens, Hopper
many_tokens        our CUDA kernel on ``wgmma.sp`` for many tokens and a weight of 8 bits, Hopper
cusparselt         NVIDIA's cuSPARSELt, with a plan that is made once
torch_cusparselt   torch's operator on cuSPARSELt, which makes a plan at every call
expand             our CUDA kernel that makes the dense weight anew, then cuBLAS
cublas             cuBLAS on a dense weight that is kept beside the packed one
dense_fp8          torch's product with a dense float8 weight
round_tokens       our CUDA kernel that rounds tokens to 8 bits, for products with a weight of 8 bits
gather             our Triton kernel that packs a trained weight whose mask is frozen
=================  ================================================================================
"""
