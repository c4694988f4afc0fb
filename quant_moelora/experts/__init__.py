"""Backends: who computes a layer of experts, and which one is chosen."""
