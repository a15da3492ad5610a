"""The packed file: 2:4 weights at 0.5625 of their 16-bit size, in plain safetensors."""
