"""What a draft is attached to."""
