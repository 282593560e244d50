"""Bases and polar factors of single matrices: tensors in, tensors out, torch only."""
