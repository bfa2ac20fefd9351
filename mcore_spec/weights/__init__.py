"""Weight names in every layout, and streaming them in and out."""
