"""Divides variables, and the gradients of one step, into blocks."""
