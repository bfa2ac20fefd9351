"""What a training run will need, reckoned from sizes alone: bytes a rank, work, layouts that fit. Imports no torch."""
