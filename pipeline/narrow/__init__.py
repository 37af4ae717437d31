"""narrow: take feed-forward channels out of every block, and refit what reads the others."""
