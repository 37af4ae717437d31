"""Many builds from one file of models, recipes and budgets: run by Ray, then measured one model at a time."""
