"""Training and evaluation: model, objective, step, loop, checkpoints, zero-shot scores."""
