"""Flower's ServerApp: the round loop, folding, the server's optimizer, checkpoints."""
