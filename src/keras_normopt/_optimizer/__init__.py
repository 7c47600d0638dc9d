"""Generates optimizer classes from those of Keras."""
