"""Measuring models: tales tells how well a model knows the rules of the toy world."""
