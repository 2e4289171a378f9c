"""Which rows of a dataset a model already knows by heart: scores, how far they tell groups apart, and a filter."""
