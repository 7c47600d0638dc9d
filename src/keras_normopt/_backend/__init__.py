"""What differs between JAX, TensorFlow and PyTorch."""
