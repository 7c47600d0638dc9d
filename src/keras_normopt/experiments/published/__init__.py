"""The comparisons in the documentation."""
