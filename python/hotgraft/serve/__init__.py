"""Skills inside inference servers: swapped between two steps while they serve."""
