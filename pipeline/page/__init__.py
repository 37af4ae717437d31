"""A chat page: the one that ``serve`` answers with, and the same as a folder of static files that runs the model in the browser."""
