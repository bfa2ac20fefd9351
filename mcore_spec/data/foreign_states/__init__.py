"""Hidden states in the forms of other tools: read and written, one form a file, all with the same shape."""
