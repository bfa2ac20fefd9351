"""What a draft is trained for: from rows of the base's features to a loss. One family of drafts a file."""
