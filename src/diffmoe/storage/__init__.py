"""What is kept in files: models, runs, and indices to search."""
