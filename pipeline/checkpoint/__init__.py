"""Everything that knows what a folder of weights holds: names, shapes, float and packed matrices, torch models of them."""
