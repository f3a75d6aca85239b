"""Where a method touches a model: linear layers, embeddings, whole modules."""
