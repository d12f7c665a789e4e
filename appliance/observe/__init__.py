"""What the box says about itself: log lines, metrics, machine resources."""
