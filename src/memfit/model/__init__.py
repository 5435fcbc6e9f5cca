"""Analysis of a model's modules (among others repeated blocks, roles of linear layers, and modules that can
run slice by slice) and of the tensors in a batch."""
