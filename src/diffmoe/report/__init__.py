"""The page that shows all that can be seen of a trained model."""
