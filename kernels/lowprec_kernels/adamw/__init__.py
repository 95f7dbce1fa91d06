"""AdamW over compressed states: the definition (reference.py) and the fused kernel (triton_kernel.py)."""
