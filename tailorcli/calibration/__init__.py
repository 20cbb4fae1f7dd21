"""Run a model on data and measure the Hessian of each of its parameters."""
