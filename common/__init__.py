"""What every floor uses and nothing of speech: settings, command lines, errors, units, files."""
