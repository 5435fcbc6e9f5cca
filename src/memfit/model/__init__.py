"""What is in a module: repeated blocks, the data flow between them, the roles of linear layers."""
