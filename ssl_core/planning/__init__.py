"""What a training step needs of a device's memory, and how to take the step within it."""
