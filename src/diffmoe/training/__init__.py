"""The training loop, what it minimises, and what several processes must agree on."""
