"""Where replicas are found, and when they join, drain and leave."""
