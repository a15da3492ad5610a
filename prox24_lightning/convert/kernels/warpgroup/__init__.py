"""The Hopper kernel for 1 to 512 tokens on wgmma.sp."""
