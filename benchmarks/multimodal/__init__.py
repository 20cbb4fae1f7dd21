"""Model Tailor on a model that sees: two visual question tasks, from the weights to what is forgotten."""
