"""What runs in the workers: one trial, its engine, its checkpoints, its evaluation."""
