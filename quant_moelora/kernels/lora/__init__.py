"""LoRA on experts: shrink v = x A^T and expand delta = v B^T, over (expert, adapter) segments."""
