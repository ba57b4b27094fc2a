"""Flower's ClientApp and the SuperNode launcher: local self-supervised training on a device."""
