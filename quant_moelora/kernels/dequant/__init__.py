"""From packed codes to the weights that a matrix unit multiplies."""
