"""Scripts around the package: environment, demo model, style checker. Not installed."""
