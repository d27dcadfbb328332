"""The data path: raw protocols on both sides. Knows HTTP, decides nothing."""
