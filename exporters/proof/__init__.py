"""Proof that an artifact computes what its checkpoint computes, and what depends on it: the accuracy level."""
