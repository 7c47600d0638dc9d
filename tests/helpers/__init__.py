"""Holds code that several test files share."""
