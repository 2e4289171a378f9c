"""Small models, small tasks and experiments that run on a laptop."""
