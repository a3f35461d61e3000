"""Numerical kernels. Each plain torch reference op is the meaning that a faster twin beside it has to reproduce."""
