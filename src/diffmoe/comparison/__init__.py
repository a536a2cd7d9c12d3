"""A fair comparison: named arms over the same seeds, what they gained and what it cost, and whether it is chance."""
