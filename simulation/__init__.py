"""Simulates many clients on one machine or a Ray cluster, with the same apps as on devices."""
