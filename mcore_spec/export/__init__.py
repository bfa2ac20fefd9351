"""Directories that inference engines load."""
