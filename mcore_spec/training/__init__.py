"""Training: one loop for every draft and layout."""
