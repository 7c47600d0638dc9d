"""Transforms of the gradients of one step, one file each."""
