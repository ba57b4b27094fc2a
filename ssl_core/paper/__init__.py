"""Reproduces the paper's Tables 2 and 3 and Figures 2 and 3. Not shipped to devices."""
