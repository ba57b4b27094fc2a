"""How a pretraining step is taken: crops, step, optimizer, schedule, checkpoints, run directory."""
