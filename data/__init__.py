"""Readers, generators and downloads. Nothing here knows a method: files in, tensors out."""
