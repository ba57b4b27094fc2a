"""Estimates the memory of training steps and plans steps that fit a device."""
