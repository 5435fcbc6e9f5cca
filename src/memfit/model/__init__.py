"""Analysis of a model's modules: repeated blocks, data flow between them, roles of linear layers."""
