"""What everything may use: errors, files, environment, messages between processes."""
