"""What a draft is trained on: the distillation loss of its steps, readable (`reference`) and fast (`fused`)."""
