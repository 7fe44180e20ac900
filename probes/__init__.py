"""The science: what is read from a model, how it becomes a risk, and the file that carries it.

Knows torch, numpy, safetensors and msgspec; knows no web, no model library and no scikit-learn.
"""
