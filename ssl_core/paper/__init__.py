"""The paper's Tables 2 and 3 and Figures 2 and 3 beside ours. Not shipped to devices."""
