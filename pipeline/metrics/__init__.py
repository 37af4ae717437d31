"""Loss, KL divergence and top-1 agreement, in numpy and in torch side by side."""
