"""Hides the differences between JAX, TensorFlow and PyTorch."""
