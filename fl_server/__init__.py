"""Flower's ServerApp: the round loop, folding, the server's optimiser, checkpoints."""
