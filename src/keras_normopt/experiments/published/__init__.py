"""The comparisons that the documentation publishes."""
