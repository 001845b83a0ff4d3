"""Schedule templates for CPUs, one operator a file."""
