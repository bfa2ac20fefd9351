"""EAGLE-3 training steps, side by side: this package, ModelOpt and speculators. Started by `eagle3_step.sh`."""
