"""What to build: options, targets, layer rules, the plan and its resource estimate."""
