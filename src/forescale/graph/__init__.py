"""A model as a graph of operators: captured from PyTorch, costed, written and read as JSON."""
