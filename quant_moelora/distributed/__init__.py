"""Tensor and expert parallel on torch.distributed: experts of one layer shared by several processes."""
